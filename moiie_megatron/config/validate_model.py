"""Conditions on the model: language model, vision encoder, experts."""

from __future__ import annotations

from moiie_megatron.config.families import LANGUAGE_FAMILIES, load_family
from moiie_megatron.config.messages import divisors
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.alignment import GROUPED_MM_BYTES
from moiie_megatron.layout.experts import moe_layers
from moiie_megatron.utils.errors import UserError

_GROUPED_MM_MULTIPLE = GROUPED_MM_BYTES // 2  # values in bf16


def check_language(config: RunConfig) -> None:
    """Refuse sizes of the language model that do not fit together.

    Raises:
        UserError: The first impossible value.
    """
    language = config.language
    heads, groups = language.num_attention_heads, language.num_query_groups
    if language.rope_scaling is not None and language.longrope is not None:
        raise UserError(
            "language.rope_scaling and language.longrope are both given: a model has one of them, "
            "set the other to null."
        )
    rope = language.rope_scaling
    if rope is not None and rope.low_freq_factor >= rope.high_freq_factor:
        raise UserError(
            f"language.rope_scaling.low_freq_factor is {rope.low_freq_factor} but "
            f"language.rope_scaling.high_freq_factor is {rope.high_freq_factor}: use a smaller low "
            "one."
        )
    if language.head_dim is None and (language.hidden_size % heads or language.head_size % 2):
        raise UserError(
            f"language.hidden_size is {language.hidden_size} but language.num_attention_heads is "
            f"{heads}: use a multiple of {2 * heads}, rotary embeddings turn pairs of channels."
        )
    if heads % groups:
        raise UserError(
            f"language.num_query_groups is {groups} but language.num_attention_heads is {heads}: "
            f"use {divisors(heads)}."
        )
    if language.head_size % 2:
        raise UserError(
            f"language.head_dim is {language.head_dim}: use an even number, rotary embeddings turn "
            "pairs of channels."
        )
    family = load_family(LANGUAGE_FAMILIES, language.family)
    for name in ("qkv_bias", "qk_norm"):
        value, wanted = getattr(language, name), family.fixed.get(name, False)
        if value != wanted:
            raise UserError(
                f"language.{name} is {_yaml(value)}, but it is {_yaml(wanted)} in every model of "
                f"the family {language.family}: set it to {_yaml(wanted)}."
            )
    pairs = language.head_size // 2
    for name in ("short_factor", "long_factor") if language.longrope is not None else ():
        count = len(getattr(language.longrope, name))
        if count != pairs:
            raise UserError(
                f"language.longrope.{name} has {count} numbers but heads have {2 * pairs} "
                f"channels: give {pairs}, one per pair of channels."
            )


def check_vision(config: RunConfig) -> None:
    """Refuse sizes of the vision encoder that do not fit together.

    Raises:
        UserError: The first impossible value.
    """
    vision = config.vision
    if vision.image_size < vision.patch_size:
        raise UserError(
            f"vision.image_size is {vision.image_size} but vision.patch_size is "
            f"{vision.patch_size}: use {vision.patch_size} or more."
        )
    if vision.hidden_size % vision.num_attention_heads:
        raise UserError(
            f"vision.num_attention_heads is {vision.num_attention_heads} but vision.hidden_size "
            f"is {vision.hidden_size}: use {divisors(vision.hidden_size)}."
        )
    if -vision.feature_layer > vision.num_layers:
        raise UserError(
            f"vision.feature_layer is {vision.feature_layer} but vision.num_layers is "
            f"{vision.num_layers}: use -{vision.num_layers} to -1."
        )


def check_experts(config: RunConfig) -> None:
    """Refuse experts that do not fit the model, the parallel layout or the dispatcher.

    Raises:
        UserError: The first impossible value.
    """
    # Checked in dense stages too: stage 2 usually shares the section with stage 1.
    layout = config.moe.layout
    if not layout.is_dense:
        moe_layers(config.moe.layers, config.language.num_layers)
    check_family = load_family(LANGUAGE_FAMILIES, config.language.family).check
    if check_family is not None:
        check_family(config)
    if not config.has_experts:
        return
    if not config.moe_layers:
        raise UserError(
            f"moe.layers is {config.moe.layers!r} but language.num_layers is "
            f"{config.language.num_layers}, so no layer holds experts: use all, or more layers."
        )
    parallel = config.parallel
    if layout.num_experts % parallel.expert:
        raise UserError(
            f"parallel.expert is {parallel.expert} but the moe section has {layout.num_experts} "
            f"experts: use {divisors(layout.num_experts)}."
        )
    loads = config.moe.expert_loads
    if loads is not None and len(loads) != layout.num_experts:
        raise UserError(
            f"moe.expert_loads has {len(loads)} numbers but the moe section has "
            f"{layout.num_experts} experts: give one per expert."
        )
    if config.moe.aux_loss == "pooled" and parallel.pipeline > 1:
        raise UserError(
            f"moe.aux_loss is pooled but parallel.pipeline is {parallel.pipeline}: pooling needs "
            "all MoE layers on one stage, use per_layer or parallel.pipeline=1."
        )
    if config.moe.dispatcher == "allgather" and config.data.padding != "sequence_length":
        raise UserError(
            f"moe.dispatcher is allgather but data.padding is {config.data.padding}: set "
            "data.padding to sequence_length, ranks must gather equal numbers of tokens."
        )
    hidden, ffn = config.language.hidden_size, config.language.ffn_hidden_size
    if ffn % parallel.expert_tensor:
        raise UserError(
            f"parallel.expert_tensor is {parallel.expert_tensor} but language.ffn_hidden_size is "
            f"{ffn}: use {divisors(ffn)}."
        )
    if hidden % _GROUPED_MM_MULTIPLE:
        raise UserError(
            f"language.hidden_size is {hidden}: with experts use a multiple of "
            f"{_GROUPED_MM_MULTIPLE}, which grouped matrix multiplication needs."
        )
    if (ffn // parallel.expert_tensor) % _GROUPED_MM_MULTIPLE:
        raise UserError(
            f"language.ffn_hidden_size is {ffn} and parallel.expert_tensor is "
            f"{parallel.expert_tensor}: with experts their quotient must be a multiple of "
            f"{_GROUPED_MM_MULTIPLE}, which grouped matrix multiplication needs."
        )


def _yaml(value: bool) -> str:
    return str(value).lower()
