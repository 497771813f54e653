"""Ranks to simulate: which ones stand for all others of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.stages import layers_of_ranks
from moiie_megatron.planning.routing import RoutingAssumption
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.planning.workload import Workload
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Job:
    """A simulation of one rank.

    Attributes:
        config: The run.
        world: Number of ranks.
        rank: Which of them.
        workload: Its micro-batches.
        routing: How tokens choose experts; not read in a run without experts.
    """

    config: RunConfig
    world: int
    rank: int
    workload: Workload
    routing: RoutingAssumption


Outcome = RankTrace | UserError
# Runs simulations, several at a time; a layout that cannot be built gives the error.
Simulate = Callable[[Sequence[Job]], Sequence[Outcome]]


@dataclass(frozen=True)
class Inputs:
    """What a run processes, for any layout.

    Attributes:
        workloads: For a configuration and a number of ranks the micro-batches of a data-parallel
            rank: typical ones, from which a step's time is estimated, and the worst ones that can
            be expected, for which memory is planned.
        routing: For a configuration and its typical micro-batches how tokens choose experts; a
            skew depends on the placement of experts and on the image tokens.
    """

    workloads: Callable[[RunConfig, int], tuple[Workload, Workload]]
    routing: Callable[[RunConfig, Workload], RoutingAssumption]


def alike_stages(config: RunConfig) -> list[int]:
    """For every pipeline rank the first one with the same layers, vision tower and output layer.

    Of ranks that are alike the first one holds the most micro-batches at a time.
    """
    assert config.pipeline_layers is not None  # see config/validate_parallel.py
    ranks = layers_of_ranks(config.pipeline_layers, config.parallel.pipeline)
    moe = set(config.moe_layers)
    first_with: dict[object, int] = {}
    result = []
    for number, chunks in enumerate(ranks):
        sizes = tuple((len(chunk), len(moe & set(chunk))) for chunk in chunks)
        key = (number == 0, number == len(ranks) - 1, sizes)
        result.append(first_with.setdefault(key, number))
    return result


def rank_of_stage(
    config: RunConfig, world: int, stage: int, loads: Sequence[float] | None = None
) -> int:
    """The rank of a pipeline rank with the most to do.

    It has the most loaded experts, and among equals the most images (tensor-parallel rank 0).

    Args:
        config: The run.
        world: Number of ranks.
        stage: Pipeline rank.
        loads: Load of every expert-parallel rank; None if they are even.
    """
    parallel = config.active_parallel
    size = world // parallel.pipeline
    # Megatron numbers ranks by tensor, then data, then pipeline parallelism; within a pipeline
    # rank experts by their tensor, then expert, then data parallelism.
    ranks = range(stage * size, (stage + 1) * size)
    if loads is None:
        return ranks[0]
    return max(
        ranks,
        key=lambda rank: (
            loads[(rank % size) // parallel.expert_tensor % parallel.expert],
            -(rank % parallel.tensor),
            -rank,
        ),
    )


def enough_micro_batches(config: RunConfig, workload: Workload) -> Workload:
    """The first micro-batches of a step, as many as show its peak of memory.

    Megatron's schedule holds at most one micro-batch for each pipeline rank, or with virtual
    stages fewer chunks of micro-batches than two rounds over all ranks have.
    """
    parallel = config.parallel
    rounds = 2 if parallel.virtual_pipeline > 1 else 1
    return first_micro_batches(workload, rounds * parallel.pipeline)


def first_micro_batches(workload: Workload, count: int) -> Workload:
    """The first micro-batches of a step."""
    return replace(workload, micro_batches=workload.micro_batches[:count])


def micro_batches_at_once(config: RunConfig, stage: int, count: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at the same time.

    With virtual stages a fraction: the rank holds chunks of them (Megatron's schedules,
    ``get_pp_rank_microbatches``).

    Args:
        config: The run.
        stage: Pipeline rank.
        count: Micro-batches of a step.
    """
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    behind = pipeline - stage - 1
    if virtual == 1:
        return min(count, behind + 1)
    return min(count * virtual, 2 * behind + (virtual - 1) * pipeline + 1) / virtual
