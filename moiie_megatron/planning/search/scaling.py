"""How a layout scales with the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.planning.hardware import Hardware
from moiie_megatron.planning.plans.extrapolate import simulate_shallow
from moiie_megatron.planning.plans.jobs import Inputs, Simulate
from moiie_megatron.planning.plans.markdown import table
from moiie_megatron.planning.plans.plan import Plan, checked, plan_jobs, plan_of
from moiie_megatron.planning.plans.plan_report import layout_text, plan_values
from moiie_megatron.planning.step_time import BUBBLE, GRADIENTS, LAUNCHES, WEIGHTS
from moiie_megatron.utils.errors import UserError

# What the terms of a step are shown as.
KINDS = (
    *("computation", "tensor parallelism", "expert parallelism", "pipeline"),
    *("data parallelism", "kernel launches", "other communication"),
)


@dataclass(frozen=True)
class ScalingPoint:
    """A number of ranks.

    Attributes:
        world: How many.
        plan: Extrapolated from few layers.
    """

    world: int
    plan: Plan


def plan_scaling(
    config: RunConfig,
    worlds: Sequence[int],
    hardware: Hardware,
    inputs: Inputs,
    simulate: Simulate,
) -> list[ScalingPoint]:
    """Plan a layout on several numbers of ranks, with as many samples per rank on each.

    Args:
        config: The run on the first number of ranks; its global batch grows with them.
        worlds: Numbers of ranks, multiples of the first.
        hardware: What it runs on.
        inputs: What it processes.
        simulate: Runs ranks; one of any world costs the same.

    Raises:
        UserError: A number of ranks that the layout cannot have.
    """
    prepared = [
        plan_jobs(grown, world, inputs)
        for world, grown in zip(worlds, grown_configs(config, worlds), strict=True)
    ]
    outcomes = simulate_shallow([job for one in prepared for job in one.jobs], simulate)
    traces = checked(outcomes)
    points, start = [], 0
    for one in prepared:
        own = traces[start : start + len(one.jobs)]
        start += len(one.jobs)
        points.append(ScalingPoint(one.world, plan_of(one, hardware, own)))
    return points


def grown_configs(config: RunConfig, worlds: Sequence[int]) -> list[RunConfig]:
    """The run on every number of ranks.

    Raises:
        UserError: A number of ranks is no multiple of the first one, or the layout cannot have it.
    """
    result = []
    for world in worlds:
        if world % worlds[0]:
            raise UserError(
                f"--scaling has {world} after {worlds[0]}: use multiples of the first number."
            )
        batch = config.train.global_batch_size * (world // worlds[0])
        train = config.train.model_copy(update={"global_batch_size": batch})
        grown = config.model_copy(update={"train": train})
        check_config(grown, world_size=world)
        result.append(grown)
    return result


def seconds_by_kind(plan: Plan) -> dict[str, float]:
    """The middle of the step's time, by what it is spent on (``KINDS``)."""
    sums = dict.fromkeys(KINDS, 0.0)
    for name, estimate in plan.time.terms.items():
        sums[_kind(name)] += estimate.middle
    return sums


def scaling_text(points: Sequence[ScalingPoint]) -> str:
    """The points as a table in Markdown."""
    first = points[0].plan
    base = first.time.tokens_per_second.middle / points[0].world
    rows = []
    for point in points:
        time, config = point.plan.time, point.plan.config
        per_rank = time.tokens_per_second.middle / point.world
        kinds = seconds_by_kind(point.plan)
        waits = {kind: seconds for kind, seconds in kinds.items() if kind != "computation"}
        largest = max(waits, key=lambda kind: waits[kind])
        rows.append(
            [
                f"{point.world}",
                f"{config.train.global_batch_size}",
                f"{time.seconds.low:.2f} to {time.seconds.high:.2f}",
                f"{per_rank:,.0f}",
                f"{per_rank / base:.1%}",
                f"{largest} ({waits[largest] / time.seconds.middle:.1%})",
                point.plan.verdict,
            ]
        )
    header = ["GPUs", "global batch", "step, s", "tokens/s per GPU", "of the first"]
    header += ["largest term beside computation", "memory"]
    title = f"# {layout_text(first.config)} on {first.hardware.name}, the batch grows with the GPUs"
    return f"{title}\n\n{table(header, rows)}\n"


def scaling_values(points: Sequence[ScalingPoint]) -> list[dict[str, Any]]:
    """The points as JSON values."""
    return [plan_values(point.plan) for point in points]


def _kind(term: str) -> str:
    known = {
        BUBBLE: "pipeline",
        LAUNCHES: "kernel launches",
        GRADIENTS: "data parallelism",
        WEIGHTS: "data parallelism",
        "pp communication": "pipeline",
        "tp communication": "tensor parallelism",
        "ep communication": "expert parallelism",
        "expt_tp communication": "expert parallelism",
        "tp_ep communication": "expert parallelism",
    }
    if term.endswith(" communication"):
        return known.get(term, "other communication")
    return known.get(term, "computation")
