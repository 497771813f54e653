"""Conditions that join several values of a configuration: what cannot run is refused here.

Each failed condition is one ``UserError`` sentence with the keys, their values and what is
allowed.  Nothing here reads the disk except ``check_paths``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moiie_megatron.config.families import LANGUAGE_FAMILIES, load_family, template_names
from moiie_megatron.config.messages import listed, unknown_key
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate_data import check_exists, check_loader, check_source_paths
from moiie_megatron.config.validate_packing import check_packing
from moiie_megatron.layout.experts import moe_layers
from moiie_megatron.utils.errors import UserError

# torch's grouped matrix multiplication needs strides of 16 bytes: 8 values in bf16.
_GROUPED_MM_MULTIPLE = 8


def check_config(config: RunConfig, *, world_size: int | None = None) -> None:
    """Refuse impossible combinations.

    Args:
        config: The run.
        world_size: Number of ranks; None leaves out what depends on it.

    Raises:
        UserError: The first impossible combination.
    """
    _check_language(config)
    _check_vision(config)
    _check_experts(config)
    _check_stage(config)
    _check_parallel(config)
    _check_data(config)
    check_packing(config)
    check_loader(config)
    _check_train(config)
    if world_size is not None:
        _check_world(config, world_size)


def check_paths(config: RunConfig) -> None:
    """Refuse paths that do not exist; relative ones start at the current directory.

    A run needs sources of data; the configuration in a converted checkpoint has none.

    Raises:
        UserError: No source, or the first missing file or folder, with its key.
    """
    if not config.data.sources:
        raise UserError("data.sources is empty: give at least one source of records and images.")
    check_exists("data.tokenizer", config.data.tokenizer, "a tokenizer folder or .model file")
    check_source_paths(config)
    for key, path in (
        ("language.pretrained", config.language.pretrained),
        ("vision.pretrained", config.vision.pretrained),
        ("checkpoint.init_from", config.checkpoint.init_from),
    ):
        if path is not None:
            check_exists(key, path, "a folder", want="folder")


def check_megatron_section(
    section: Mapping[str, Any], field_names: Iterable[str], owned: Mapping[str, str]
) -> None:
    """Refuse keys of the ``megatron`` section that do not exist or have their own key elsewhere.

    Args:
        section: The section: further fields of Megatron's TransformerConfig.
        field_names: All fields that TransformerConfig has.
        owned: Field -> what sets it, usually a configuration key.

    Raises:
        UserError: The first such key.
    """
    names = set(field_names)
    for name, value in section.items():
        if name in owned:
            raise UserError(
                f"megatron.{name} is {value!r}, but {name} is set by {owned[name]}: "
                "leave it out of the megatron section."
            )
        if name not in names:
            free = sorted(names - set(owned))
            sentence = unknown_key(f"megatron.{name}", name, free)
            # TransformerConfig has hundreds of fields: without a near one, name the class.
            if "did you mean" not in sentence:
                sentence = (
                    f"megatron.{name} is not a known key: use a field of Megatron-Core's "
                    "TransformerConfig."
                )
            raise UserError(sentence)


def _check_language(config: RunConfig) -> None:
    language = config.language
    heads, groups = language.num_attention_heads, language.num_query_groups
    if language.rope_scaling is not None and language.longrope is not None:
        raise UserError(
            "language.rope_scaling and language.longrope are both given: a model has one of them, "
            "set the other to null."
        )
    if language.head_dim is None and (language.hidden_size % heads or language.head_size % 2):
        raise UserError(
            f"language.hidden_size is {language.hidden_size} but language.num_attention_heads is "
            f"{heads}: use a multiple of {2 * heads}, rotary embeddings turn pairs of channels."
        )
    if heads % groups:
        raise UserError(
            f"language.num_query_groups is {groups} but language.num_attention_heads is {heads}: "
            f"use {_divisors(heads)}."
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


def _check_vision(config: RunConfig) -> None:
    vision = config.vision
    if vision.image_size < vision.patch_size:
        raise UserError(
            f"vision.image_size is {vision.image_size} but vision.patch_size is "
            f"{vision.patch_size}: use {vision.patch_size} or more."
        )
    if vision.hidden_size % vision.num_attention_heads:
        raise UserError(
            f"vision.num_attention_heads is {vision.num_attention_heads} but vision.hidden_size "
            f"is {vision.hidden_size}: use {_divisors(vision.hidden_size)}."
        )
    if -vision.feature_layer > vision.num_layers:
        raise UserError(
            f"vision.feature_layer is {vision.feature_layer} but vision.num_layers is "
            f"{vision.num_layers}: use -{vision.num_layers} to -1."
        )


def _check_experts(config: RunConfig) -> None:
    # Checked in dense stages too: stage 2 usually shares the section with stage 1.
    layout = config.moe.layout
    if not layout.is_dense:
        moe_layers(config.moe.layers, config.language.num_layers)
    check_family = load_family(LANGUAGE_FAMILIES, config.language.family).check
    if check_family is not None:
        check_family(config)
    if not _has_experts(config):
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
            f"experts: use {_divisors(layout.num_experts)}."
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
            f"{ffn}: use {_divisors(ffn)}."
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


def _check_stage(config: RunConfig) -> None:
    stage = config.stage
    if stage.template not in template_names():
        raise UserError(f"stage.template is {stage.template!r}: use {listed(template_names())}.")
    if not stage.learning_rates:
        raise UserError(
            "stage.learning_rates is empty, so nothing would train: give a rate for at least one "
            "of vision, connector, language and moe."
        )
    if "moe" in stage.learning_rates and not _has_experts(config):
        raise UserError(
            f"stage.learning_rates.moe is {stage.learning_rates['moe']} but the model has no "
            f"experts (stage.moe is {str(stage.moe).lower()}, moe.variant is "
            f"{config.moe.variant}): set stage.learning_rates.moe to null, or set stage.moe to "
            "true with moe.variant vanilla, modality or moiie."
        )


def _check_parallel(config: RunConfig) -> None:
    parallel, language = config.parallel, config.language
    tensor = parallel.tensor
    if language.num_layers % parallel.pipeline:
        raise UserError(
            f"parallel.pipeline is {parallel.pipeline} but language.num_layers is "
            f"{language.num_layers}: use {_divisors(language.num_layers)}."
        )
    for key in ("num_attention_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(language, key)
        if value % tensor:
            raise UserError(
                f"parallel.tensor is {tensor} but language.{key} is {value}: "
                f"use {_divisors(value)}."
            )
    groups = language.num_query_groups
    # Megatron-Core, attention.py: with fewer groups than ranks, ranks share a group, and the
    # fused qkv projection must still split evenly.
    qkv = (language.num_attention_heads + 2 * groups) * language.head_size
    if (groups % tensor and tensor % groups) or qkv % tensor:
        raise UserError(
            f"parallel.tensor is {tensor} but language.num_query_groups is {groups}: use a "
            f"divisor or a multiple of {groups} that divides the {qkv} rows of the qkv projection."
        )
    if parallel.sequence and tensor == 1:
        raise UserError(
            "parallel.sequence is true but parallel.tensor is 1: set parallel.tensor to 2 or "
            "more, or leave parallel.sequence out."
        )
    if tensor > 1 and _has_experts(config) and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.sequence is false but parallel.tensor is {tensor} and the model has "
            "experts: set parallel.sequence to true, or parallel.tensor to 1."
        )


def _check_data(config: RunConfig) -> None:
    data, parallel = config.data, config.parallel
    if not data.image_token:
        raise UserError("data.image_token is '': use a text such as <image>.")
    needed = config.vision.num_image_tokens + 2
    if data.sequence_length < needed:
        raise UserError(
            f"data.sequence_length is {data.sequence_length}, but one image takes "
            f"{config.vision.num_image_tokens} tokens: use {needed} or more."
        )
    if data.sequence_length > config.language.max_position_embeddings:
        raise UserError(
            f"data.sequence_length is {data.sequence_length} but language.max_position_embeddings "
            f"is {config.language.max_position_embeddings}: use at most that."
        )
    if parallel.sequence_parallel and data.sequence_length % parallel.tensor:
        raise UserError(
            f"data.sequence_length is {data.sequence_length} but sequence parallelism cuts it "
            f"into parallel.tensor = {parallel.tensor} parts: use a multiple of {parallel.tensor}."
        )


def _check_train(config: RunConfig) -> None:
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        raise UserError(
            f"train.steps is {_null(train.steps)} and train.epochs is {_null(train.epochs)}: "
            "give exactly one of the two."
        )
    if train.global_batch_size % train.micro_batch_size:
        raise UserError(
            f"train.global_batch_size is {train.global_batch_size} but train.micro_batch_size is "
            f"{train.micro_batch_size}: use a multiple of {train.micro_batch_size}."
        )
    traced = config.profile.steps
    if traced is not None and traced[0] > traced[1]:
        raise UserError(
            f"profile.steps is {traced}: give the first step to trace and then the last."
        )


def _check_world(config: RunConfig, world_size: int) -> None:
    parallel, train = config.parallel, config.train
    model = parallel.tensor * parallel.pipeline
    if world_size % model:
        raise UserError(
            f"The run has {world_size} ranks but parallel.tensor is {parallel.tensor} and "
            f"parallel.pipeline is {parallel.pipeline}: start a multiple of {model} ranks."
        )
    experts = parallel.expert_tensor * parallel.expert * parallel.pipeline
    # Without experts their degrees are not used: one section serves the dense first stage too.
    if _has_experts(config) and world_size % experts:
        raise UserError(
            f"The run has {world_size} ranks but parallel.expert is {parallel.expert}, "
            f"parallel.expert_tensor is {parallel.expert_tensor} and parallel.pipeline is "
            f"{parallel.pipeline}: start a multiple of {experts} ranks."
        )
    replicas = world_size // model
    portion = train.micro_batch_size * replicas
    if train.global_batch_size % portion:
        raise UserError(
            f"train.global_batch_size is {train.global_batch_size} but train.micro_batch_size is "
            f"{train.micro_batch_size} on {replicas} data-parallel ranks: use a multiple of "
            f"{portion}."
        )
    absent = [rank for rank in config.profile.ranks if rank >= world_size]
    if config.profile.steps is not None and absent:
        raise UserError(
            f"profile.ranks has {absent[0]} but the run has {world_size} ranks: use at most "
            f"{world_size - 1}."
        )


def _has_experts(config: RunConfig) -> bool:
    return config.stage.moe and config.moe.variant != "dense"


def _divisors(number: int) -> str:
    """The numbers that divide ``number``, or just that when they are many."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return listed(divisors) if len(divisors) <= 8 else f"a divisor of {number}"


def _null(value: object) -> object:
    return "null" if value is None else value


def _yaml(value: bool) -> str:
    return str(value).lower()
