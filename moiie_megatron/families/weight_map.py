"""The weight map: every weight of a model under its Megatron name and its Hugging Face name(s).

One row says all that is known of a tensor: names, transform, shape, how tensor parallelism splits
it and whose expert it is.  Import, export, verification, parameter counts, inspection and
resharding read these rows; the tables they are made from are in the files of the families.

Megatron names are those of our distributed checkpoints (``ShardedTensor.key``): experts have one
name and a logical expert id, so neither placement nor parallel layout shows.  Hugging Face names
come in two layouts (``NameLayout``), the reference's and that of our own exports.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from moiie_megatron.config.schema import LanguageConfig, RunConfig, VisionConfig
from moiie_megatron.families.family import Weight
from moiie_megatron.families.language.llama import MOE as SPLIT_MOE
from moiie_megatron.families.registry import language_family, vision_family
from moiie_megatron.families.transforms import WeightTransform, same
from moiie_megatron.layout.experts import ExpertLayout

LANGUAGE: Final = "language_model."
VISION: Final = "vision_encoder.model."
CONNECTOR: Final = "connector."
ROUTER: Final = ".mlp.router.gates."
EXPERTS: Final = ".mlp.experts.experts."

EMBEDDING: Final = "language_model.embedding.word_embeddings.weight"
OUTPUT_LAYER: Final = "language_model.output_layer.weight"
VOCABULARY: Final = (EMBEDDING, OUTPUT_LAYER)  # a row for every token (layout/vocabulary.py)

# Dense layers name the norm after the linear layer that Transformer Engine fuses it with; the
# norm in front of experts stands alone.
_MOE_NORM: Final = ".pre_mlp_layernorm.weight"
_DENSE_NORM: Final = ".mlp.linear_fc1.layer_norm_weight"


@dataclass(frozen=True)
class WeightMapping:
    """One Megatron tensor; of an expert's tensor the slice of one expert.

    Args:
        megatron: Its name in our checkpoints.
        hf: The Hugging Face tensors that it consists of, in the order that the transform expects.
        transform: How to get from one side to the other.
        shape: Of the Megatron tensor, of experts without the expert axis; None where a table does
            not say it (the connector in a file, which may have any width).
        shard_axis: The axis that tensor parallelism splits (experts: expert tensor parallelism);
            None where every rank has the whole tensor.
        shard_blocks: The axis consists of so many equal blocks, each split by itself.
        layer: Number (from 0) of the layer of its decoder or vision tower; None outside layers.
        expert: Logical id where the tensor is one expert's slice of its name; None otherwise.
    """

    megatron: str
    hf: tuple[str, ...]
    transform: WeightTransform
    shape: tuple[int, ...] | None
    shard_axis: int | None = None
    shard_blocks: int = 1
    layer: int | None = None
    expert: int | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape, where the row was made from a whole configuration."""
        assert self.shape is not None, self.megatron
        return self.shape

    @property
    def num_parameters(self) -> int:
        return math.prod(self.full_shape)

    @property
    def part(self) -> str:
        """language, experts, routers, vision or connector."""
        return part_of(self.megatron)


@dataclass(frozen=True)
class NameLayout:
    """A layout of Hugging Face names for the whole model.

    Args:
        language: What stands in front of the language model's names.
        vision: The same for the vision tower.
        connector: The same for the connector.
        connector_layers: What the connector's two linear layers are called.
        split_experts: Experts have gate_proj and up_proj also in families that name them
            otherwise.
    """

    language: str
    vision: str
    connector: str
    connector_layers: tuple[str, str]
    split_experts: bool


# transformers' own names for dense models, and the reference's for models with experts.
REFERENCE: Final = NameLayout("model.", "vision_model.", "model.mm_projector.", ("0", "2"), False)
# Our exported models: transformers' LLaVA names around the backbone's own.
EXPORTED: Final = NameLayout(
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


def part_of(name: str) -> str:
    """language, experts, routers, vision, connector, or optimizer for what is no weight."""
    if name.startswith(LANGUAGE):
        return "routers" if ROUTER in name else "experts" if EXPERTS in name else "language"
    if name.startswith(VISION):
        return "vision"
    return "connector" if name.startswith(CONNECTOR) else "optimizer"


def model_rows(config: RunConfig, naming: NameLayout = EXPORTED) -> list[WeightMapping]:
    """Everything that a run's model consists of: vision tower, connector, decoder."""
    language, vision = config.language, config.vision
    inner = config.connector.hidden_size or language.hidden_size
    sizes = (vision.hidden_size, inner, language.hidden_size)
    return [
        *vision_rows(vision, naming.vision),
        *connector_rows(naming.connector, naming.connector_layers, sizes),
        *language_rows(language, config.moe.layout, config.moe_layers, naming),
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
    family = language_family(language.family)
    expand = _Expander(language, naming.language)
    moe = SPLIT_MOE if naming.split_experts else family.moe
    rows = [
        expand(weight)
        for weight in family.weights
        if "*" not in weight.megatron
        and not (language.tied_embeddings and weight.megatron == OUTPUT_LAYER)
    ]
    for layer in range(language.num_layers):
        rows += [expand(weight, layer) for weight in family.weights if "*" in weight.megatron]
        if layer in moe_layers:
            rows += _moe_rows(expand, moe, layout, layer)
        else:
            rows += [expand(weight, layer) for weight in family.ffn]
    return rows


def vision_rows(vision: VisionConfig, prefix: str = REFERENCE.vision) -> list[WeightMapping]:
    """The vision tower.

    Args:
        prefix: What stands in front of its Hugging Face names: ``vision_model.`` on the hub, the
            empty string in what transformers 5 writes, something longer in composed checkpoints.
    """
    family = vision_family(vision.family)
    sizes = {
        "hidden": vision.hidden_size,
        "ffn": vision.ffn_hidden_size,
        "patch": vision.patch_size,
        "positions": vision.num_image_tokens + family.num_class_tokens,
    }

    def row(weight: Weight, layer: int | None = None) -> WeightMapping:
        numbers = () if layer is None else (layer,)
        return WeightMapping(
            _numbered(weight.megatron, *numbers),
            (prefix + _numbered(weight.hf[0], *numbers).removeprefix(REFERENCE.vision),),
            same(),
            _shape(weight, sizes),
            layer=layer,
        )

    outside = [weight for weight in family.weights if "*" not in weight.megatron]
    inside = [weight for weight in family.weights if "*" in weight.megatron]
    layers = range(vision.num_layers)
    return [*map(row, outside), *(row(weight, layer) for layer in layers for weight in inside)]


def connector_rows(
    prefix: str = REFERENCE.connector,
    layers: tuple[str, str] = REFERENCE.connector_layers,
    sizes: tuple[int, int, int] | None = None,
) -> list[WeightMapping]:
    """The connector; its Hugging Face names are LLaVA's and the reference's ``mm_projector``.

    Args:
        sizes: Hidden sizes of vision tower, connector and decoder, where they are known.
    """
    image, inner, hidden = sizes or (0, 0, 0)
    rows = []
    for ours, theirs, shape in (
        ("linear_1", layers[0], (inner, image)),
        ("linear_2", layers[1], (hidden, inner)),
    ):
        for kind, of_kind in (("weight", shape), ("bias", shape[:1])):
            known = of_kind if sizes is not None else None
            hf = (f"{prefix}{theirs}.{kind}",)
            rows.append(WeightMapping(f"{CONNECTOR}{ours}.{kind}", hf, same(), known))
    return rows


class _Expander:
    """Lines of a language family's table as rows.

    Args:
        language: Gives the sizes.
        prefix: What stands in front of Hugging Face names, in the tables ``model.``.
    """

    def __init__(self, language: LanguageConfig, prefix: str) -> None:
        self._language, self._prefix = language, prefix
        heads, groups, head = (
            language.num_attention_heads,
            language.num_query_groups,
            language.head_size,
        )
        self._sizes = {
            "vocab": language.vocab_size,
            "hidden": language.hidden_size,
            "ffn": language.ffn_hidden_size,
            "gate_up": 2 * language.ffn_hidden_size,
            "head": head,
            "attention": heads * head,
            "qkv": (heads + 2 * groups) * head,
        }

    def __call__(
        self,
        weight: Weight,
        layer: int | None = None,
        expert: int | None = None,
        router: int | None = None,
    ) -> WeightMapping:
        """A row.

        Args:
            weight: Line of a table.
            layer: From 0, for a line with ``*``.
            expert: Logical id, for an expert's line.
            router: Experts that the router scores, for a router's line.
        """
        numbers = [number for number in (layer, expert) if number is not None]
        sizes = self._sizes if router is None else {**self._sizes, "router": router}
        return WeightMapping(
            _numbered(weight.megatron, *numbers),
            tuple(self._hf_name(name, numbers) for name in weight.hf),
            weight.transform(self._language),
            _shape(weight, sizes),
            weight.shard_axis,
            weight.shard_blocks,
            layer,
            expert,
        )

    def _hf_name(self, name: str, numbers: Collection[int]) -> str:
        name = _numbered(name, *numbers)
        of_table = REFERENCE.language
        if name.startswith(of_table):
            return self._prefix + name.removeprefix(of_table)
        return name


def _moe_rows(
    expand: _Expander, table: tuple[Weight, ...], layout: ExpertLayout, layer: int
) -> list[WeightMapping]:
    """Routers, then experts one after the other, then the norm."""
    routers = {w.megatron.rpartition(".")[2]: w for w in table if ROUTER in w.megatron}
    experts = [w for w in table if EXPERTS in w.megatron]
    others = [w for w in table if w not in experts and w not in routers.values()]
    return [
        *(
            expand(routers[name], layer, router=len(layout.allowed(name)))
            for name in layout.routers
        ),
        *(expand(w, layer, expert) for expert in range(layout.num_experts) for w in experts),
        *(expand(w, layer) for w in others),
    ]


def _numbered(name: str, *numbers: int) -> str:
    """``name`` with its first ``*`` replaced by the first number, and so on."""
    for number in numbers:
        name = name.replace("*", str(number), 1)
    return name


def _shape(weight: Weight, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else sizes[size] for size in weight.shape)
