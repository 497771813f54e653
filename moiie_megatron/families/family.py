"""What the file of a family defines: a table of its weights and its ``config.json``.

A table is written in the names that are on disk.  Everything else (import, export, verification,
sizes, resharding) is derived from it by ``families/weight_map.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moiie_megatron.config.schema import LanguageConfig, RunConfig
from moiie_megatron.families import transforms
from moiie_megatron.families.transforms import WeightTransform

# Index into a stored tensor that stands for a part of it.
Part = tuple[int | slice, ...]


def same(language: LanguageConfig) -> WeightTransform:
    """One tensor on both sides."""
    return transforms.same()


def gate_up(language: LanguageConfig) -> WeightTransform:
    """Two input projections of a gated FFN <-> ``linear_fc1``."""
    return transforms.gate_up()


def qkv(language: LanguageConfig) -> WeightTransform:
    """Three projections, or their biases, <-> ``linear_qkv``."""
    return transforms.qkv(language.num_attention_heads, language.num_query_groups)


@dataclass(frozen=True)
class Weight:
    """A line of a table: a Megatron tensor and the Hugging Face tensors that it consists of.

    In names the first ``*`` stands for the number of the layer, the second one (in Hugging Face
    names alone) for the logical id of an expert.  Experts share one Megatron name.

    Sizes of a language model are ``vocab``, ``hidden``, ``ffn``, ``gate_up`` (2 ffn), ``head``
    (channels of a head), ``attention`` (all query heads), ``qkv`` (all query, key and value
    heads) and ``router`` (experts that a router scores); those of a vision tower ``hidden``,
    ``ffn``, ``patch`` (pixels per side) and ``positions`` (patches and class tokens).

    Args:
        megatron: Name in our checkpoints.
        hf: Names in the order that the transform expects.
        shape: Of the whole Megatron tensor, of experts that of one expert.
        shard_axis: What tensor parallelism splits; None where every rank has the whole tensor.
        shard_blocks: The axis consists of so many equal blocks, each split by itself (2 where it
            is ``[gate | up]``).
        transform: From one side to the other, for the sizes of a language model.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[str | int, ...]
    shard_axis: int | None = None
    shard_blocks: int = 1
    transform: Callable[[LanguageConfig], WeightTransform] = same


def vision_weights(shapes: Mapping[str, tuple[str | int, ...]]) -> tuple[Weight, ...]:
    """The table of a vision tower, which is transformers' own module.

    Names in Megatron and in Hugging Face files differ in their prefixes only.

    Args:
        shapes: Name in the module -> shape.
    """
    return tuple(
        Weight(f"vision_encoder.model.{name}", (f"vision_model.{name}",), shape)
        for name, shape in shapes.items()
    )


@dataclass(frozen=True)
class ChatFormat:
    """A chat format with fixed markers around every turn, for ``stage.template``.

    Args:
        name: As in ``stage.template``.
        header: In front of a turn; ``{role}`` is user, assistant or system.
        end: Ends a turn; trained on after an assistant turn.
        markers: Tokens that the vocabulary must have.
        begin: In front of the conversation.
        gap: Between the end of a turn and the next header.
        strips: White space around the text of a turn is left out.
    """

    name: str
    header: str
    end: str
    markers: tuple[str, ...]
    begin: str = ""
    gap: str = ""
    strips: bool = False


@dataclass(frozen=True)
class LanguageFamily:
    """A family of decoders.

    All of them are built by the same Megatron model: RMSNorm in front of attention and FFN,
    rotary embeddings, a gated FFN with SiLU and without biases.  Families differ in the names of
    their weights, in ``qkv_bias``, ``qk_norm``, ``head_dim`` and ``sliding_window``, and in how
    their ``config.json`` says so.

    Args:
        name: Value of ``language.family``, and ``model_type`` in transformers.
        config: Keys of the ``language`` section and what ``config.json`` calls them.
        weights: Everything but the FFN.  The output layer is left out where embeddings are tied.
        ffn: FFN of a dense layer, and the norm in front of it.
        moe: The same for a layer with experts: routers, experts, norm.
        fixed: Values of ``qkv_bias`` and ``qk_norm`` that all models of the family have; False
            where they are left out.
        read: From a ``config.json`` (defaults filled in) to keys of the ``language`` section that
            are not copied.  Raises ``UnsupportedError``.
        write: From the ``language`` section to further keys of ``config.json``.
        expert_config: Keys of the ``moe`` section and what ``config.json`` calls them, where
            pretrained models come with experts (then Vanilla MoE in every layer).
        split_stored: From name and shape of a stored tensor to the names in the table that its
            parts have; None for a tensor that is stored under its name in the table.
        exported_as: ``model_type`` whose decoder layers an exported model has; default: its own.
        longrope_names: Values of ``rope_type`` that mean LongRoPE.
        chat_formats: Formats that ``stage.template`` may name.
        default_template: ``stage.template`` of a tokenizer without a chat template.
        check: Raises for runs that the family cannot have.
    """

    name: str
    config: Mapping[str, str]
    weights: tuple[Weight, ...]
    ffn: tuple[Weight, ...]
    moe: tuple[Weight, ...]
    fixed: Mapping[str, bool] = field(default_factory=dict)
    read: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    write: Callable[[LanguageConfig], dict[str, Any]] | None = None
    expert_config: Mapping[str, str] = field(default_factory=dict)
    split_stored: Callable[[str, tuple[int, ...]], dict[str, Part] | None] | None = None
    exported_as: str | None = None
    longrope_names: tuple[str, ...] = ("longrope",)
    chat_formats: tuple[ChatFormat, ...] = ()
    default_template: str = "plain"
    check: Callable[[RunConfig], None] | None = None

    @property
    def has_experts(self) -> bool:
        """Its pretrained models come with experts."""
        return bool(self.expert_config)


class UnsupportedError(Exception):
    """A value in a ``config.json`` that our model cannot have.

    Args:
        key: Its key.
        value: The value.
        known: What would be possible.
    """

    def __init__(self, key: str, value: object, known: object) -> None:
        super().__init__(key, value, known)
        self.key, self.value, self.known = key, value, known


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation per channel (RGB), of pixels scaled to 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class VisionFamily:
    """A family of vision encoders, built by transformers.

    Args:
        name: Value of ``vision.family``.
        model_type: In transformers.
        config: Keys of the ``vision`` section and what ``config.json`` calls them.
        weights: The tower without a pooling head; Hugging Face names as on the hub.
        statistics: Of the released preprocessors.
        image_processor: Class in transformers that prepares images for it.
        fixed_config: Further keys of ``config.json``.
        num_class_tokens: Positions in front of the patches.
        pre_norm: Module between embeddings and layers.
        feature_strategy: LLaVA's ``vision_feature_select_strategy`` for all patches and nothing
            else.
    """

    name: str
    model_type: str
    config: Mapping[str, str]
    weights: tuple[Weight, ...]
    statistics: PixelStatistics
    image_processor: str
    feature_strategy: str
    fixed_config: Mapping[str, Any] = field(default_factory=dict)
    num_class_tokens: int = 0
    pre_norm: str | None = None
