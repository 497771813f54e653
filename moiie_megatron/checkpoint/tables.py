"""The name tables: every weight under its Megatron name and its Hugging Face name(s).

One row serves both directions.  Megatron names are those of our distributed checkpoints
(``ShardedTensor.key``); experts have one name and a logical expert id, so neither placement nor
parallel layout shows.  Hugging Face names follow transformers (files ``modeling_llama.py``,
``modeling_phi3.py``, ``modeling_siglip.py``, ``modeling_clip.py``); the names inside MoE layers
follow the MoIIE reference: ``mlp.gate`` is the text router (in Vanilla MoE the only one),
``mlp.gate_vis`` the vision router, ``mlp.experts.{i}`` the experts in logical order.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moiie_megatron.checkpoint import tensors
from moiie_megatron.checkpoint.tensors import Surgery
from moiie_megatron.config.schema import LanguageConfig, VisionConfig
from moiie_megatron.experts.layout import ExpertLayout

LANGUAGE = "language_model."
VISION = "vision_encoder.model."
CONNECTOR = "connector."
ROUTER = ".mlp.router.gates."

# What stands in front of the language model's names in a Hugging Face checkpoint.
HF_LANGUAGE = "model."

_ROUTERS = {"vision": "gate_vis", "text": "gate", "joint": "gate"}


@dataclass(frozen=True)
class Row:
    """One Megatron tensor.

    Args:
        megatron: Its name in our checkpoints.
        hf: The Hugging Face tensors that it consists of, in the order that the surgery expects.
        surgery: How to get from one side to the other.
        expert: Logical id where the tensor is one expert's slice of its name; None otherwise.
    """

    megatron: str
    hf: tuple[str, ...]
    surgery: Surgery
    expert: int | None = None


def language_rows(
    language: LanguageConfig, layout: ExpertLayout, moe_layers: Collection[int]
) -> list[Row]:
    """The decoder, with experts in ``moe_layers`` (from 0; empty for a dense model).

    Tied embeddings have no row of their own for the output layer: in Megatron as in transformers
    the embedding matrix is stored once.
    """
    same = tensors.same()
    rows = [
        Row(
            LANGUAGE + "embedding.word_embeddings.weight",
            (HF_LANGUAGE + "embed_tokens.weight",),
            same,
        ),
        Row(LANGUAGE + "decoder.final_layernorm.weight", (HF_LANGUAGE + "norm.weight",), same),
    ]
    if not language.tied_embeddings:
        rows.append(Row(LANGUAGE + "output_layer.weight", ("lm_head.weight",), same))
    for number in range(language.num_layers):
        layer, hf_layer = f"{LANGUAGE}decoder.layers.{number}.", f"{HF_LANGUAGE}layers.{number}."
        rows += _attention_rows(language, layer, hf_layer)
        if number in moe_layers:
            rows += _moe_rows(language, layout, layer, hf_layer)
        else:
            rows += _ffn_rows(language, layer + "mlp.", hf_layer + "mlp.")
        norm = "pre_mlp_layernorm.weight" if number in moe_layers else _FUSED_NORM
        rows.append(Row(layer + norm, (hf_layer + "post_attention_layernorm.weight",), same))
    return rows


# Dense layers name the norm after the linear layer that Transformer Engine fuses it with; the
# norm in front of experts stands alone.
_FUSED_NORM = "mlp.linear_fc1.layer_norm_weight"


def _attention_rows(language: LanguageConfig, layer: str, hf_layer: str) -> list[Row]:
    heads, groups = language.num_attention_heads, language.num_query_groups
    attention, hf_attention = layer + "self_attention.", hf_layer + "self_attn."
    names: tuple[str, ...]
    if language.family == "phi3":
        names, surgery = ("qkv_proj",), tensors.stacked_qkv(heads, groups)
    else:
        names, surgery = ("q_proj", "k_proj", "v_proj"), tensors.qkv(heads, groups)
    return [
        Row(
            attention + "linear_qkv.layer_norm_weight",
            (hf_layer + "input_layernorm.weight",),
            tensors.same(),
        ),
        Row(
            attention + "linear_qkv.weight",
            tuple(f"{hf_attention}{name}.weight" for name in names),
            surgery,
        ),
        Row(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), tensors.same()),
    ]


def _ffn_rows(
    language: LanguageConfig, mlp: str, hf_mlp: str, expert: int | None = None
) -> list[Row]:
    names: tuple[str, ...]
    if language.family == "phi3":  # its gate_up_proj already is [gate | up]
        names, surgery = ("gate_up_proj",), tensors.same()
    else:
        names, surgery = ("gate_proj", "up_proj"), tensors.gate_up()
    return [
        Row(
            mlp + "linear_fc1.weight",
            tuple(f"{hf_mlp}{name}.weight" for name in names),
            surgery,
            expert,
        ),
        Row(mlp + "linear_fc2.weight", (hf_mlp + "down_proj.weight",), tensors.same(), expert),
    ]


def _moe_rows(
    language: LanguageConfig, layout: ExpertLayout, layer: str, hf_layer: str
) -> list[Row]:
    rows = [
        Row(
            f"{layer.removesuffix('.')}{ROUTER}{router}",
            (f"{hf_layer}mlp.{_ROUTERS[router]}.weight",),
            tensors.same(),
        )
        for router in layout.routers
    ]
    for expert in range(layout.num_experts):
        hf_expert = f"{hf_layer}mlp.experts.{expert}."
        rows += _ffn_rows(language, layer + "mlp.experts.experts.", hf_expert, expert)
    return rows


def vision_rows(vision: VisionConfig, prefix: str = "vision_model.") -> list[Row]:
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
    return [Row(VISION + name, (prefix + name,), tensors.same()) for name in names]


def connector_rows(prefix: str = "model.mm_projector.") -> list[Row]:
    """The connector; its Hugging Face names are LLaVA's and the reference's ``mm_projector``."""
    return [
        Row(f"{CONNECTOR}{ours}.{kind}", (f"{prefix}{theirs}.{kind}",), tensors.same())
        for ours, theirs in (("linear_1", "0"), ("linear_2", "2"))
        for kind in ("weight", "bias")
    ]
