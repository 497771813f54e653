"""Search for the fastest layout of a run that fits.

1. Every layout is checked as a run checks it, and by the bytes of its states.
2. The first ones by a rough time (``screening.py``) are planned from small simulations
   (``rough_plans.py``), each with more and more recomputation until it fits.
3. The fastest one is simulated as it is; if it does not fit, the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.stages import layers_of_ranks
from moiie_megatron.planning.hardware import Hardware
from moiie_megatron.planning.plans.extrapolate import shallow_of
from moiie_megatron.planning.plans.jobs import Inputs, Simulate
from moiie_megatron.planning.plans.plan import Plan, make_plan
from moiie_megatron.planning.plans.plan_report import layout_text
from moiie_megatron.planning.search.layouts import Refused, layouts, recomputations
from moiie_megatron.planning.search.rough_plans import rough_plans
from moiie_megatron.planning.search.screening import screening

_UNLIKE = (
    "Its pipeline stages have different numbers of layers with experts, so some have more to do "
    "than others."
)


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
        shallow: Layouts with few layers and micro-batches.
        deep: Layouts that fit as they are.
    """

    shallow: int = 10
    deep: int = 1


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
    refused += [Refused(layout_text(one), _UNLIKE) for one in possible if _is_unlike(one)]
    possible = [layout for layout in possible if not _is_unlike(layout)]
    size = size or SearchSize()
    rough = screening(config, world, hardware, inputs)
    by_time = sorted(((rough.seconds(layout), i) for i, layout in enumerate(possible)))
    chosen = [possible[i] for _, i in by_time[: size.shallow]]
    slowest = by_time[: size.shallow][-1][0] if chosen else 0.0
    late = tuple(
        Refused(layout_text(possible[i]), _late(seconds, slowest, len(chosen)))
        for seconds, i in by_time[size.shallow :]
    )
    fitting, too_large = _rough_plans(chosen, world, hardware, inputs, simulate)
    found, failed = _deep_plans(fitting, size.deep, simulate, inputs)
    return SearchResult(tuple(found), (*refused, *too_large, *failed), late)


def _is_unlike(layout: RunConfig) -> bool:
    """Whether pipeline stages differ in their layers, and not because the user wants it."""
    parallel = layout.parallel
    if parallel.stages == 1 or parallel.pipeline_layers is not None:
        return False
    assert layout.pipeline_layers is not None  # see config/validate_parallel.py
    moe = set(layout.moe_layers)
    ranks = layers_of_ranks(layout.pipeline_layers, parallel.pipeline)
    return len({len(moe & set(chunk)) for chunks in ranks for chunk in chunks}) > 1


def _late(seconds: float, slowest: float, count: int) -> str:
    return (
        f"It was not simulated: by arithmetic a step takes {seconds:.2f} s, and at most "
        f"{slowest:.2f} s in the {count} layouts that were."
    )


def _rough_plans(
    chosen: Sequence[RunConfig],
    world: int,
    hardware: Hardware,
    inputs: Inputs,
    simulate: Simulate,
) -> tuple[list[Plan], list[Refused]]:
    """The plans of layouts that fit, with as little recomputation as possible, and the others."""
    fitting: list[Plan] = []
    refused: dict[int, Refused] = {}
    # All layouts in each round, so that simulations run side by side.
    left = {number: recomputations(layout) for number, layout in enumerate(chosen)}
    while left := {number: choices for number, choices in left.items() if choices}:
        tried = {number: choices.pop(0) for number, choices in left.items()}
        plans = rough_plans(list(tried.values()), world, hardware, inputs, simulate)
        for number, plan in zip(tried, plans, strict=True):
            if isinstance(plan, Plan) and plan.verdict != "does not fit":
                fitting.append(plan)
                refused.pop(number, None)
                left[number] = []
            else:
                reason = plan.sentence if isinstance(plan, Plan) else str(plan)
                refused[number] = Refused(layout_text(tried[number]), reason)
    return fitting, list(refused.values())


def _deep_plans(
    fitting: Sequence[Plan], count: int, simulate: Simulate, inputs: Inputs
) -> tuple[list[Found], list[Refused]]:
    """The fastest plans again with the whole model, until ``count`` of them fit, then the rest."""
    found: list[Found] = []
    refused = []
    for plan in sorted(fitting, key=lambda plan: plan.time.seconds.middle):
        if sum(one.is_deep for one in found) == count:
            found.append(Found(plan, is_deep=False))
            continue
        deep = plan
        if shallow_of(plan.config) is not None:  # else it was simulated as it is
            deep = make_plan(plan.config, plan.world, plan.hardware, inputs, simulate)
        if deep.verdict == "does not fit":
            refused.append(Refused(layout_text(plan.config), deep.sentence))
        else:
            found.append(Found(deep, is_deep=True))
    return sorted(found, key=lambda one: one.plan.time.seconds.middle), refused
