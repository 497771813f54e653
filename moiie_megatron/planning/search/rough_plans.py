"""Plans of many layouts from few and small simulations.

The ranks of a layout are simulated with few layers, without virtual stages, and with one
micro-batch.  What a further micro-batch keeps while it waits in the pipeline is the difference of
one and two of them on the first pipeline rank, and the schedule says how many a rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.hardware import Hardware
from moiie_megatron.planning.plans.extrapolate import shallow_of, simulate_shallow
from moiie_megatron.planning.plans.jobs import (
    Inputs,
    Job,
    Simulate,
    first_micro_batches,
    micro_batches_at_once,
)
from moiie_megatron.planning.plans.plan import Plan, PlanJobs, plan_jobs, plan_of
from moiie_megatron.planning.trace import MemoryTrace, Part, RankTrace
from moiie_megatron.utils.errors import UserError

_FIRST_ONLY: tuple[Part, ...] = ("vision", "connector", "embedding")


def rough_plans(
    layouts: Sequence[RunConfig],
    world: int,
    hardware: Hardware,
    inputs: Inputs,
    simulate: Simulate,
) -> list[Plan | UserError]:
    """The plans of layouts, side by side; an error for one that cannot be built.

    Time and memory are both of the worst micro-batches.

    Args:
        layouts: Runs, checked for ``world`` ranks.
        world: Number of ranks.
        hardware: What they run on.
        inputs: What they process.
        simulate: Runs ranks.
    """
    prepared = [
        _Rough.of(replace(plan_jobs(layout, world, inputs), for_time=())) for layout in layouts
    ]
    outcomes = simulate_shallow([job for one in prepared for job in one.jobs], simulate)
    plans: list[Plan | UserError] = []
    start = 0
    for one in prepared:
        own = outcomes[start : start + len(one.jobs)]
        start += len(one.jobs)
        error = next((outcome for outcome in own if isinstance(outcome, UserError)), None)
        traces = [outcome for outcome in own if isinstance(outcome, RankTrace)]
        plans.append(error or plan_of(one.prepared, hardware, one.stages(traces)))
    return plans


@dataclass(frozen=True)
class _Rough:
    """The simulations of a layout.

    Attributes:
        prepared: Its ranks.
        jobs: Each of them with one micro-batch, and the first one with two; or, if ``is_whole``,
            each with all that it holds.
    """

    prepared: PlanJobs
    jobs: tuple[Job, ...]
    is_whole: bool

    @classmethod
    def of(cls, prepared: PlanJobs) -> _Rough:
        prepared = replace(prepared, for_time=())
        config, ranks = prepared.config, prepared.for_memory
        if config.parallel.pipeline == 1 or shallow_of(config) is None:
            # As they are: in the latter case with the schedule of the run.
            return cls(prepared, ranks, is_whole=True)

        def job(of: Job, count: int) -> Job:
            return replace(of, workload=first_micro_batches(prepared.worst, count))

        return cls(prepared, (*(job(rank, 1) for rank in ranks), job(ranks[0], 2)), is_whole=False)

    def stages(self, traces: Sequence[RankTrace]) -> list[RankTrace]:
        """The ranks with as many micro-batches as they hold."""
        ranks = traces[: len(self.prepared.for_memory)]
        if self.is_whole:
            return list(ranks)
        one, two = (trace.memory.peak.activations for trace in (traces[0], traces[-1]))
        count = len(self.prepared.worst.micro_batches)
        held = {
            part: max(0, two.get(part, 0) - one.get(part, 0))
            for part in dict.fromkeys([*one, *two])
        }
        return [
            replace(
                trace,
                memory=_with_more(
                    trace.memory,
                    {p: n for p, n in held.items() if trace.stage == 0 or p not in _FIRST_ONLY},
                    micro_batches_at_once(self.prepared.config, trace.stage, count) - 1,
                ),
            )
            for trace in ranks
        ]


def _with_more(memory: MemoryTrace, held: dict[Part, int], times: float) -> MemoryTrace:
    """Memory with further micro-batches in the pipeline."""
    activations = dict(memory.peak.activations)
    for part, number in held.items():
        activations[part] = activations.get(part, 0) + round(number * times)
    peak = replace(memory.peak, activations=activations)
    return replace(memory, peak=peak, timeline=(peak,))
