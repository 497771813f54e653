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
    if config.pipeline_layers is None:
        raise UserError(
            f"parallel.pipeline is {parallel.pipeline} but language.num_layers is "
            f"{language.num_layers}: use {divisors(language.num_layers)}."
        )
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
    absent = [rank for rank in config.profile.ranks if rank >= world_size]
    if config.profile.steps is not None and absent:
        raise UserError(
            f"profile.ranks has {absent[0]} but the run has {world_size} ranks: use at most "
            f"{world_size - 1}."
        )
