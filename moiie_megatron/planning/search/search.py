"""Search for the fastest layout of a run that fits.

1. Every layout is checked as a run checks it, and by the bytes of its states.
2. The first ones by a rough time (``screening.py``) are simulated with few layers, each with more
   and more recomputation until it fits, and extrapolated to the depth of the run.
3. The fastest are simulated as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.hardware import Hardware
from moiie_megatron.planning.plans.extrapolate import simulate_shallow
from moiie_megatron.planning.plans.jobs import Inputs, Job, Outcome, Simulate
from moiie_megatron.planning.plans.plan import Plan, make_plan, plan_jobs, plan_of
from moiie_megatron.planning.plans.plan_report import layout_text
from moiie_megatron.planning.search.layouts import Refused, layouts, recomputations
from moiie_megatron.planning.search.screening import screening
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Found:
    """A layout that fits.

    Attributes:
        plan: Its plan.
        is_deep: Whether the whole model was simulated; else it was extrapolated from few layers.
    """

    plan: Plan
    is_deep: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        found: Layouts that fit, the fastest first (by the middle of the time range).
        refused: The others, with a reason each.
        not_simulated: Layouts that may fit but came late in the screening, with a reason each.
    """

    found: tuple[Found, ...]
    refused: tuple[Refused, ...]
    not_simulated: tuple[Refused, ...]


@dataclass(frozen=True)
class SearchSize:
    """How much is simulated.

    Attributes:
        shallow: Layouts with few layers.
        deep: Layouts as they are.
    """

    shallow: int = 12
    deep: int = 3


def search(
    config: RunConfig,
    world: int,
    hardware: Hardware,
    inputs: Inputs,
    simulate: Simulate,
    size: SearchSize = SearchSize(),
) -> SearchResult:
    """Find the fastest layouts.

    Args:
        config: The run; other degrees of parallelism, micro-batch sizes (without packing) and
            settings of recomputation are tried.
        world: Number of ranks.
        hardware: What it runs on.
        inputs: What it processes.
        simulate: Runs ranks.
        size: How much is simulated; None for the defaults.
    """
    every = list(layouts(config, world, hardware))
    refused = [layout for layout in every if isinstance(layout, Refused)]
    possible = [layout for layout in every if isinstance(layout, RunConfig)]
    size = size or SearchSize()
    rough = screening(config, world, hardware, inputs)
    by_time = sorted(((rough.seconds(layout), i) for i, layout in enumerate(possible)))
    chosen = [possible[i] for _, i in by_time[: size.shallow]]
    slowest = by_time[: size.shallow][-1][0] if chosen else 0.0
    late = tuple(
        Refused(layout_text(possible[i]), _late(seconds, slowest, len(chosen)))
        for seconds, i in by_time[size.shallow :]
    )
    fitting, too_large = _shallow_plans(chosen, world, hardware, inputs, simulate)
    found, failed = _deep_plans(fitting, size.deep, simulate, inputs)
    return SearchResult(tuple(found), (*refused, *too_large, *failed), late)


def _late(seconds: float, slowest: float, count: int) -> str:
    return (
        f"It was not simulated: by arithmetic a step takes {seconds:.2f} s, and at most "
        f"{slowest:.2f} s in the {count} layouts that were."
    )


def _shallow_plans(
    chosen: Sequence[RunConfig],
    world: int,
    hardware: Hardware,
    inputs: Inputs,
    simulate: Simulate,
) -> tuple[list[Plan], list[Refused]]:
    """The plans of layouts that fit, with as little recomputation as possible, and the others."""

    def shallow(jobs: Sequence[Job]) -> Sequence[Outcome]:
        return simulate_shallow(jobs, simulate)

    fitting: list[Plan] = []
    last: dict[int, Refused] = {}
    # All layouts in each round, so that simulations run side by side.
    open_layouts = {number: recomputations(layout) for number, layout in enumerate(chosen)}
    while open_layouts:
        tried = {number: choices[0] for number, choices in open_layouts.items()}
        prepared = {n: plan_jobs(layout, world, inputs) for n, layout in tried.items()}
        jobs = [job for one in prepared.values() for job in one.jobs]
        outcomes = iter(shallow(jobs))
        for number, one in prepared.items():
            own = [next(outcomes) for _ in one.jobs]
            error = next((o for o in own if isinstance(o, UserError)), None)
            text = layout_text(tried[number])
            if error is not None:
                last[number] = Refused(text, str(error))
            else:
                plan = plan_of(one, hardware, [o for o in own if not isinstance(o, UserError)])
                if plan.verdict != "does not fit":
                    fitting.append(plan)
                    last.pop(number, None)
                    del open_layouts[number]
                    continue
                last[number] = Refused(text, plan.sentence)
            open_layouts[number] = open_layouts[number][1:]
        open_layouts = {n: choices for n, choices in open_layouts.items() if choices}
    return fitting, list(last.values())


def _deep_plans(
    fitting: Sequence[Plan], count: int, simulate: Simulate, inputs: Inputs
) -> tuple[list[Found], list[Refused]]:
    """The fastest plans again with the whole model, then all that fit in order."""
    ordered = sorted(fitting, key=lambda plan: plan.time.seconds.middle)
    found = [Found(plan, is_deep=False) for plan in ordered[count:]]
    refused = []
    for plan in ordered[:count]:
        deep = make_plan(plan.config, plan.world, plan.hardware, inputs, simulate)
        if deep.verdict == "does not fit":
            refused.append(Refused(layout_text(plan.config), deep.sentence))
        else:
            found.append(Found(deep, is_deep=True))
    return sorted(found, key=lambda one: one.plan.time.seconds.middle), refused
