"""Conditions on the degrees of parallelism and on the number of ranks."""

from __future__ import annotations

from moiie_megatron.config.messages import divisors
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError


def check_parallel(config: RunConfig) -> None:
    """Refuse degrees of parallelism that do not divide the model.

    Raises:
        UserError: The first impossible value.
    """
    parallel, language = config.parallel, config.language
    tensor = parallel.tensor
    _check_stages(config)
    for key in ("num_attention_heads", "ffn_hidden_size"):
        value = getattr(language, key)
        if value % tensor:
            raise UserError(
                f"parallel.tensor is {tensor} but language.{key} is {value}: use {divisors(value)}."
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
    if tensor > 1 and config.has_experts and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.sequence is false but parallel.tensor is {tensor} and the model has "
            "experts: set parallel.sequence to true, or parallel.tensor to 1."
        )


def _check_stages(config: RunConfig) -> None:
    parallel, layers = config.parallel, config.language.num_layers
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError(
            f"parallel.virtual_pipeline is {parallel.virtual_pipeline} but parallel.pipeline is 1: "
            "set parallel.pipeline to 2 or more, or parallel.virtual_pipeline to 1."
        )
    if config.pipeline_layers is not None:
        return
    given = parallel.pipeline_layers
    if given is not None and len(given) == parallel.stages:
        raise UserError(
            f"parallel.pipeline_layers is {given} ({sum(given)} layers) but language.num_layers "
            f"is {layers}: give numbers that add up to {layers}."
        )
    virtual = parallel.virtual_pipeline
    stages = f"parallel.pipeline is {parallel.pipeline}"
    if virtual > 1:
        stages += f" and parallel.virtual_pipeline is {virtual}"
    if given is not None:
        raise UserError(
            f"parallel.pipeline_layers is {given} but {stages}: give {parallel.stages} numbers, "
            "one for each stage."
        )
    wanted = divisors(layers) if virtual == 1 else f"degrees whose product divides {layers}"
    raise UserError(
        f"{stages} but language.num_layers is {layers}: use {wanted}, or say with "
        "parallel.pipeline_layers how many layers each stage has."
    )


def check_world(config: RunConfig, world_size: int) -> None:
    """Refuse a number of ranks that does not fit the degrees and the batch size.

    Raises:
        UserError: The first impossible value.
    """
    parallel, train = config.parallel, config.train
    model = parallel.tensor * parallel.pipeline
    if world_size % model:
        raise UserError(
            f"The run has {world_size} ranks but parallel.tensor is {parallel.tensor} and "
            f"parallel.pipeline is {parallel.pipeline}: start a multiple of {model} ranks."
        )
    experts = parallel.expert_tensor * parallel.expert * parallel.pipeline
    # Without experts their degrees are not used: one section serves the dense first stage too.
    if config.has_experts and world_size % experts:
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
    _check_micro_batches(config, replicas)
    absent = [rank for rank in config.profile.ranks if rank >= world_size]
    if config.profile.steps is not None and absent:
        raise UserError(
            f"profile.ranks has {absent[0]} but the run has {world_size} ranks: use at most "
            f"{world_size - 1}."
        )


def _check_micro_batches(config: RunConfig, replicas: int) -> None:
    """With packing a rank's samples must be as many: rows are split down to one sample."""
    samples = 1 if config.data.packing else config.train.micro_batch_size
    portion = samples * replicas * config.micro_batches_multiple_of
    if config.train.global_batch_size % portion:
        what = "rows" if config.data.packing else "micro-batches"
        raise UserError(
            f"train.global_batch_size is {config.train.global_batch_size} but "
            f"parallel.virtual_pipeline is {config.parallel.virtual_pipeline} and "
            f"parallel.pipeline is {config.parallel.pipeline}, which need a multiple of "
            f"{config.micro_batches_multiple_of} {what} on each of {replicas} data-parallel "
            f"ranks: use a multiple of {portion}."
        )
