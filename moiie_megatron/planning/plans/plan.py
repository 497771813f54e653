"""The plan of one layout: what its ranks hold, send and compute, and how long a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.expert_load import RoutedTokens, rows_per_token
from moiie_megatron.planning.hardware import GIB, Hardware
from moiie_megatron.planning.plans.extrapolate import shallow_of, simulate_some_shallow
from moiie_megatron.planning.plans.jobs import (
    Inputs,
    Job,
    Outcome,
    Simulate,
    alike_stages,
    enough_micro_batches,
    first_micro_batches,
    rank_of_stage,
)
from moiie_megatron.planning.plans.state_bytes import StateBytes, state_bytes
from moiie_megatron.planning.routing import RoutingAssumption
from moiie_megatron.planning.step_time import StepTime, step_time
from moiie_megatron.planning.trace import MemoryTrace, RankTrace
from moiie_megatron.planning.workload import Workload
from moiie_megatron.utils.errors import UserError

# Of a GPU's memory, for what no trace knows: the CUDA context, NCCL's buffers, workspaces of
# kernels and what lies unused between the allocator's blocks.
MARGIN: Final = 0.10
# Of 454 runs on A100s and H100s none ran out of memory whose estimate was below this (Fujii et
# al., arXiv 2411.06465; language models without experts).
SAFE: Final = 0.80

_TYPICAL: Final = 4  # micro-batches that are simulated where they differ

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class StagePlan:
    """A pipeline rank, and those like it.

    Attributes:
        stages: The pipeline ranks that it stands for.
        trace: What its rank does with typical micro-batches.
        fullest: What another rank does with the worst ones, the one that they load most; it may be
            the same.
        states: The same bytes of weights, gradients and optimizer by arithmetic, and what it
            writes of a checkpoint.
    """

    stages: tuple[int, ...]
    trace: RankTrace
    fullest: RankTrace
    states: StateBytes

    @property
    def memory(self) -> MemoryTrace:
        """What the fullest rank holds."""
        return self.fullest.memory

    def margin(self, hardware: Hardware) -> int:
        """Bytes for what the trace does not know."""
        return int(MARGIN * hardware.memory)

    def free(self, hardware: Hardware) -> int:
        """Bytes that are left; negative if they do not suffice."""
        return hardware.memory - self.memory.total - self.margin(hardware)

    def verdict(self, hardware: Hardware) -> Verdict:
        if self.free(hardware) < 0:
            return "does not fit"
        return "fits" if self.memory.total <= SAFE * hardware.memory else "tight"


@dataclass(frozen=True)
class Plan:
    """One layout.

    Attributes:
        config: The run.
        world: Number of ranks.
        hardware: What it runs on.
        typical: What a data-parallel rank processes in a step.
        worst: The micro-batches that the memory is planned for.
        routing: How tokens choose experts.
        stages: Pipeline ranks that differ.
        time: Of a step.
    """

    config: RunConfig
    world: int
    hardware: Hardware
    typical: Workload
    worst: Workload
    routing: RoutingAssumption
    stages: tuple[StagePlan, ...]
    time: StepTime

    @property
    def fullest(self) -> StagePlan:
        """The pipeline rank with the least free memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def verdict(self) -> Verdict:
        return self.fullest.verdict(self.hardware)

    @property
    def sentence(self) -> str:
        """Whether the layout fits, with the figures."""
        stage, memory = self.fullest, self.hardware.memory
        held = stage.memory
        where = "" if self.config.parallel.pipeline == 1 else f" on pipeline rank {stage.stages[0]}"
        what = (
            f"{gib(held.states)} of weights, gradients and optimizer states and "
            f"{gib(held.peak.total)} of activations{where} are {gib(held.total)} of "
            f"{gib(memory)} ({held.total / memory:.0%})"
        )
        free = stage.free(self.hardware)
        margin = f"the margin of {MARGIN:.0%}"
        if free < 0:
            return f"It does not fit: {what}, {gib(-free)} too many with {margin}."
        spare = f" with less than {1 - SAFE:.0%} to spare" if self.verdict == "tight" else ""
        return f"It fits{spare}: {what}; {gib(free)} are left beside {margin}."


@dataclass(frozen=True)
class PlanJobs:
    """What has to be simulated for the plan of a layout.

    Attributes:
        config: The run.
        world: Number of ranks.
        typical: What a data-parallel rank processes in a step.
        worst: The micro-batches that the memory is planned for.
        routing: How tokens choose experts.
        for_memory: A rank of every pipeline rank that differs, with the worst micro-batches.
        for_time: The same with typical ones; empty where they are the worst ones.
    """

    config: RunConfig
    world: int
    typical: Workload
    worst: Workload
    routing: RoutingAssumption
    for_memory: tuple[Job, ...]
    for_time: tuple[Job, ...]

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All of them, in the order in which ``plan_of`` takes their traces."""
        return (*self.for_memory, *self.for_time)


def plan_jobs(config: RunConfig, world: int, inputs: Inputs) -> PlanJobs:
    """Find out what to simulate.

    Args:
        config: The run, checked for ``world`` ranks.
        world: Number of ranks.
        inputs: What it processes.
    """
    typical, worst = inputs.workloads(config, world)
    routing = inputs.routing(config, typical)
    stages = sorted(set(alike_stages(config)))

    def jobs(workload: Workload) -> tuple[Job, ...]:
        # Of these micro-batches: rows with many images load other experts than the rest does.
        loads = rank_loads(config, routing, workload)
        ranks = [rank_of_stage(config, world, stage, loads) for stage in stages]
        return tuple(Job(config, world, rank, workload, routing) for rank in ranks)

    for_memory, for_time = jobs(enough_micro_batches(config, worst)), jobs(_some(config, typical))
    is_same = worst.micro_batches == typical.micro_batches
    return PlanJobs(config, world, typical, worst, routing, for_memory, () if is_same else for_time)


def _some(config: RunConfig, typical: Workload) -> Workload:
    """Micro-batches that stand for all of a step: the first ones, or one if they are alike."""
    if shallow_of(config) is None:
        return enough_micro_batches(config, typical)  # the schedule may need that many
    alike = len(set(typical.micro_batches)) == 1
    return first_micro_batches(typical, 1 if alike else _TYPICAL)


def make_plan(
    config: RunConfig, world: int, hardware: Hardware, inputs: Inputs, simulate: Simulate
) -> Plan:
    """Plan one layout: its memory from the whole model, its time from few layers.

    Args:
        config: The run, checked for ``world`` ranks.
        world: Number of ranks.
        hardware: What it runs on.
        inputs: What it processes.
        simulate: Runs a rank.

    Raises:
        UserError: A rank cannot be built.
    """
    prepared = plan_jobs(config, world, inputs)
    outcomes = simulate_some_shallow(prepared.for_memory, prepared.for_time, simulate)
    return plan_of(prepared, hardware, checked(outcomes))


def plan_of(prepared: PlanJobs, hardware: Hardware, traces: Sequence[RankTrace]) -> Plan:
    """The plan, from the traces of ``prepared.jobs``."""
    config, world = prepared.config, prepared.world
    count = len(prepared.for_memory)
    for_memory, for_time = traces[:count], traces[-count:]
    return Plan(
        config,
        world,
        hardware,
        prepared.typical,
        prepared.worst,
        prepared.routing,
        stage_plans(config, world, for_time, for_memory),
        time_of(config, for_time, prepared.typical, hardware),
    )


def stage_plans(
    config: RunConfig, world: int, traces: Sequence[RankTrace], fullest: Sequence[RankTrace]
) -> tuple[StagePlan, ...]:
    """Pipeline ranks that differ, with what their ranks do.

    Args:
        config: The run.
        world: Number of ranks.
        traces: Of one rank of each, in order.
        fullest: Of the fullest rank of each in the worst case.
    """
    alike, states = alike_stages(config), state_bytes(config, world)
    return tuple(
        StagePlan(
            stages=tuple(stage for stage, first in enumerate(alike) if first == number),
            trace=trace,
            fullest=full,
            states=states[number],
        )
        for number, trace, full in zip(sorted(set(alike)), traces, fullest, strict=True)
    )


def time_of(
    config: RunConfig, traces: Sequence[RankTrace], workload: Workload, hardware: Hardware
) -> StepTime:
    """The time of a step, from a trace of every pipeline rank that differs."""
    alike = alike_stages(config)
    by_stage = dict(zip(sorted(set(alike)), traces, strict=True))
    return step_time(config, [by_stage[stage] for stage in alike], workload, hardware)


def rank_loads(
    config: RunConfig, routing: RoutingAssumption, workload: Workload
) -> list[float] | None:
    """Rows per token of every expert-parallel rank, mean over layers; None without experts."""
    if not config.moe_layers:
        return None
    images = RoutedTokens.of(workload.micro_batches, config).image_fraction
    layers = config.moe_layers
    rows_MN = sum(rows_per_token(routing, n, config.placement, "alltoall") for n in layers)
    means: list[float] = (np.array([images, 1 - images]) @ rows_MN / len(layers)).tolist()
    return means


def checked(outcomes: Sequence[Outcome]) -> list[RankTrace]:
    """The traces.

    Raises:
        UserError: The first of the outcomes that is one.
    """
    traces = []
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            raise outcome
        traces.append(outcome)
    return traces


def gib(number: float) -> str:
    """Bytes in GiB, for sentences."""
    return f"{number / GIB:.1f} GiB"
