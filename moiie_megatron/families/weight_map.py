"""The name tables: every weight under its Megatron name and its Hugging Face name(s).

One row serves both directions.  Megatron names are those of our distributed checkpoints
(``ShardedTensor.key``); experts have one name and a logical expert id, so neither placement nor
parallel layout shows.  Hugging Face names follow transformers (files ``modeling_llama.py``,
``modeling_phi3.py``, ``modeling_siglip.py``, ``modeling_clip.py``); the names inside MoE layers
follow the MoIIE reference: ``mlp.gate`` is the text router (in Vanilla MoE the only one),
``mlp.gate_vis`` the vision router, ``mlp.experts.{i}`` the experts in logical order.
``NameLayout`` says in which of two layouts the rest is: the reference's, or that of our exports.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moiie_megatron.config.schema import LanguageConfig, VisionConfig
from moiie_megatron.families import transforms
from moiie_megatron.families.transforms import WeightTransform
from moiie_megatron.layout.experts import ExpertLayout

LANGUAGE = "language_model."
VISION = "vision_encoder.model."
CONNECTOR = "connector."
ROUTER = ".mlp.router.gates."
EXPERTS = ".mlp.experts.experts."

# Dense layers name the norm after the linear layer that Transformer Engine fuses it with; the
# norm in front of experts stands alone.
_MOE_NORM = ".pre_mlp_layernorm.weight"
_DENSE_NORM = ".mlp.linear_fc1.layer_norm_weight"
_ROUTERS = {"vision": "gate_vis", "text": "gate", "joint": "gate"}


@dataclass(frozen=True)
class WeightMapping:
    """One Megatron tensor.

    Args:
        megatron: Its name in our checkpoints.
        hf: The Hugging Face tensors that it consists of, in the order that the surgery expects.
        surgery: How to get from one side to the other.
        expert: Logical id where the tensor is one expert's slice of its name; None otherwise.
    """

    megatron: str
    hf: tuple[str, ...]
    transform: WeightTransform
    expert: int | None = None


@dataclass(frozen=True)
class NameLayout:
    """A layout of Hugging Face names for the whole model.

    Args:
        language: What stands in front of the language model's names.
        vision: The same for the vision tower.
        connector: The same for the connector.
        connector_layers: What the connector's two linear layers are called.
        split_experts: Experts have gate_proj and up_proj also in families that fuse them.
    """

    language: str
    vision: str
    connector: str
    connector_layers: tuple[str, str]
    split_experts: bool


# transformers' own names for dense models, and the reference's for models with experts.
REFERENCE = NameLayout("model.", "vision_model.", "model.mm_projector.", ("0", "2"), False)
# Our exported models: transformers' LLaVA names around the backbone's own.
EXPORTED = NameLayout(
    "model.language_model.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    ("linear_1", "linear_2"),
    True,
)


def dense_name(name: str) -> str:
    """The tensor of the dense model that a tensor of an upcycled layer is made from."""
    if name.endswith(_MOE_NORM):
        return name.removesuffix(_MOE_NORM) + _DENSE_NORM
    return name.replace(EXPERTS, ".mlp.")


def model_rows(
    language: LanguageConfig,
    vision: VisionConfig,
    layout: ExpertLayout,
    moe_layers: Collection[int],
    naming: NameLayout = EXPORTED,
) -> list[WeightMapping]:
    """Everything: vision tower, connector, decoder."""
    return [
        *vision_rows(vision, naming.vision),
        *connector_rows(naming.connector, naming.connector_layers),
        *language_rows(language, layout, moe_layers, naming),
    ]


def language_rows(
    language: LanguageConfig,
    layout: ExpertLayout,
    moe_layers: Collection[int],
    naming: NameLayout = REFERENCE,
) -> list[WeightMapping]:
    """The decoder, with experts in ``moe_layers`` (from 0; empty for a dense model).

    Tied embeddings have no row of their own for the output layer: in Megatron as in transformers
    the embedding matrix is stored once.
    """
    same = transforms.same()
    rows = [
        WeightMapping(
            LANGUAGE + "embedding.word_embeddings.weight",
            (naming.language + "embed_tokens.weight",),
            same,
        ),
        WeightMapping(
            LANGUAGE + "decoder.final_layernorm.weight", (naming.language + "norm.weight",), same
        ),
    ]
    if not language.tied_embeddings:
        rows.append(WeightMapping(LANGUAGE + "output_layer.weight", ("lm_head.weight",), same))
    for number in range(language.num_layers):
        layer = f"{LANGUAGE}decoder.layers.{number}."
        hf_layer = f"{naming.language}layers.{number}."
        rows += _attention_rows(language, layer, hf_layer)
        if number in moe_layers:
            rows += _moe_rows(language, layout, layer, hf_layer, naming)
        else:
            rows += _ffn_rows(_ffn_parts(language), layer + "mlp.", hf_layer + "mlp.")
        norm = layer.removesuffix(".") + (_MOE_NORM if number in moe_layers else _DENSE_NORM)
        rows.append(WeightMapping(norm, (hf_layer + "post_attention_layernorm.weight",), same))
    return rows


def _attention_rows(language: LanguageConfig, layer: str, hf_layer: str) -> list[WeightMapping]:
    heads, groups = language.num_attention_heads, language.num_query_groups
    attention, hf_attention = layer + "self_attention.", hf_layer + "self_attn."
    names: tuple[str, ...]
    if language.family == "phi3":
        names, transform = ("qkv_proj",), transforms.stacked_qkv(heads, groups)
    else:
        names, transform = ("q_proj", "k_proj", "v_proj"), transforms.qkv(heads, groups)
    return [
        WeightMapping(
            attention + "linear_qkv.layer_norm_weight",
            (hf_layer + "input_layernorm.weight",),
            transforms.same(),
        ),
        WeightMapping(
            attention + "linear_qkv.weight",
            tuple(f"{hf_attention}{name}.weight" for name in names),
            transform,
        ),
        WeightMapping(
            attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), transforms.same()
        ),
    ]


@dataclass(frozen=True)
class _FfnParts:
    """What a family calls the parts of an FFN."""

    gate_up: tuple[str, ...]
    down: str


_SPLIT = _FfnParts(("gate_proj", "up_proj"), "down_proj")
_FUSED = _FfnParts(("gate_up_proj",), "down_proj")
_MIXTRAL = _FfnParts(("w1", "w3"), "w2")


def _ffn_parts(language: LanguageConfig) -> _FfnParts:
    return _FUSED if language.family == "phi3" else _SPLIT


def _ffn_rows(
    parts: _FfnParts, mlp: str, hf_mlp: str, expert: int | None = None
) -> list[WeightMapping]:
    # A fused gate_up_proj already is [gate | up].
    transform = transforms.gate_up() if len(parts.gate_up) == 2 else transforms.same()
    gate_up = tuple(f"{hf_mlp}{name}.weight" for name in parts.gate_up)
    down = (f"{hf_mlp}{parts.down}.weight",)
    return [
        WeightMapping(mlp + "linear_fc1.weight", gate_up, transform, expert),
        WeightMapping(mlp + "linear_fc2.weight", down, transforms.same(), expert),
    ]


def _moe_rows(
    language: LanguageConfig, layout: ExpertLayout, layer: str, hf_layer: str, naming: NameLayout
) -> list[WeightMapping]:
    parts, hf_mlp = _ffn_parts(language), hf_layer + "mlp."
    if naming.split_experts:
        parts = _SPLIT
    elif language.family == "mixtral":  # transformers' names on disk, not those in its modules
        parts, hf_mlp = _MIXTRAL, hf_layer + "block_sparse_moe."
    rows = [
        WeightMapping(
            f"{layer.removesuffix('.')}{ROUTER}{router}",
            (f"{hf_mlp}{_ROUTERS[router]}.weight",),
            transforms.same(),
        )
        for router in layout.routers
    ]
    experts = layer.removesuffix(".") + EXPERTS
    for expert in range(layout.num_experts):
        rows += _ffn_rows(parts, experts, f"{hf_mlp}experts.{expert}.", expert)
    return rows


def vision_rows(vision: VisionConfig, prefix: str = REFERENCE.vision) -> list[WeightMapping]:
    """The vision tower.

    Args:
        prefix: What stands in front of its Hugging Face names: ``vision_model.`` on the hub, the
            empty string in what transformers 5 writes, something longer in composed checkpoints.
    """
    names = ["embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"]
    names += [f"post_layernorm.{kind}" for kind in ("weight", "bias")]
    if vision.family == "clip":
        names += ["embeddings.class_embedding"]
        names += [f"pre_layrnorm.{kind}" for kind in ("weight", "bias")]  # transformers' spelling
    else:
        names += ["embeddings.patch_embedding.bias"]
    parts = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    parts += [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    names += [
        f"encoder.layers.{number}.{part}.{kind}"
        for number in range(vision.num_layers)
        for part in parts
        for kind in ("weight", "bias")
    ]
    return [WeightMapping(VISION + name, (prefix + name,), transforms.same()) for name in names]


def connector_rows(
    prefix: str = REFERENCE.connector, layers: tuple[str, str] = REFERENCE.connector_layers
) -> list[WeightMapping]:
    """The connector; its Hugging Face names are LLaVA's and the reference's ``mm_projector``."""
    return [
        WeightMapping(f"{CONNECTOR}{ours}.{kind}", (f"{prefix}{theirs}.{kind}",), transforms.same())
        for ours, theirs in zip(("linear_1", "linear_2"), layers, strict=True)
        for kind in ("weight", "bias")
    ]
