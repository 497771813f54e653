"""Figures of plans: memory over one step, and what a step waits for as the job grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moiie_megatron.analysis.figure import COLOURS, INK, new_figure, panel_title, save_png, tidy
from moiie_megatron.planning.hardware import GIB
from moiie_megatron.planning.plans.plan import MARGIN, Plan, StagePlan
from moiie_megatron.planning.search.scaling import KINDS, ScalingPoint, seconds_by_kind
from moiie_megatron.planning.trace import PARTS

_STATES = {"weights": "#b8b8b8", "gradients": "#d0d0d0", "optimizer": "#e4e4e4"}
# One colour for every part; those of few bytes share the last one.
_PARTS = {
    "vision": COLOURS[4],
    "attention": COLOURS[0],
    "dense_ffn": COLOURS[5],
    "dispatch": COLOURS[3],
    "experts": COLOURS[1],
    "output_layer": COLOURS[2],
}
_OTHERS = ("everything else", "#666666")


def plot_memory(plan: Plan, out: str | Path) -> Path:
    """Write the memory of every pipeline rank that differs over one step, as PNG.

    Raises:
        UserError: The file cannot be written.
    """
    return save_png(memory_figure(plan), out)


def memory_figure(plan: Plan) -> Figure:
    """Stacked areas by part; a line at the GPU's memory, a dashed one that leaves the margin."""
    stages = plan.stages
    figure = new_figure(9.0, 1.0 + 2.6 * len(stages))
    panels: list[Axes] = np.atleast_1d(np.asarray(figure.subplots(len(stages), 1))).tolist()
    for axes, stage in zip(panels, stages, strict=True):
        _memory_panel(axes, plan, stage)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5, frameon=False, labelcolor=INK
    )
    return figure


def _memory_panel(axes: Axes, plan: Plan, stage: StagePlan) -> None:
    memory = stage.memory
    samples = memory.timeline
    steps = np.arange(len(samples))
    heights = {name: np.full(len(samples), getattr(memory, name) / GIB, float) for name in _STATES}
    for part in PARTS:
        name = part if part in _PARTS else _OTHERS[0]
        values = np.array([sample.activations.get(part, 0) / GIB for sample in samples])
        heights[name] = heights.get(name, 0.0) + values
    colours = {**_STATES, **_PARTS, _OTHERS[0]: _OTHERS[1]}
    names = [name for name in colours if name in heights and np.any(heights[name])]
    axes.stackplot(
        steps,
        [heights[name] for name in names],
        labels=[name.replace("_", " ") for name in names],
        colors=[colours[name] for name in names],
        linewidth=0,
    )
    limit = plan.hardware.memory / GIB
    axes.axhline(limit, color=INK, linewidth=1.2)
    axes.axhline(limit * (1 - MARGIN), color=INK, linewidth=1.0, linestyle="--")
    axes.set_ylim(0, max(limit, memory.total / GIB) * 1.05)
    axes.set_xlim(0, max(len(samples) - 1, 1))
    _pass_ticks(axes, [sample.when for sample in samples])
    tidy(axes, "GiB")
    which = f"pipeline rank {stage.stages[0]}: " if plan.config.parallel.pipeline > 1 else ""
    where = "update" if memory.peak.when == "update" else f"{memory.peak.when} pass"
    panel_title(
        axes, f"{which}{memory.total / GIB:.1f} of {limit:.1f} GiB at the peak, in the {where}"
    )


def _pass_ticks(axes: Axes, passes: Sequence[str]) -> None:
    """Name the passes of a few micro-batches where they begin; recomputation is in backward."""
    names = ["backward" if when == "recompute" else when for when in passes]
    begins = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
    # Those that are too short for a name have none.
    ends = [*begins[1:], len(names)]
    shown = [i for i, end in zip(begins, ends, strict=True) if end - i >= len(names) / 12]
    axes.set_xticks(shown, [names[i] for i in shown])
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("left")


def plot_scaling(points: Sequence[ScalingPoint], out: str | Path) -> Path:
    """Write the time of a step by what it is spent on, for several numbers of GPUs, as PNG.

    Raises:
        UserError: The file cannot be written.
    """
    return save_png(scaling_figure(points), out)


def scaling_figure(points: Sequence[ScalingPoint]) -> Figure:
    """Bars of the middle of the range, with its ends; below the part that is no computation."""
    figure = new_figure(9.0, 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.0, 1.2])
    places = np.arange(len(points))
    kinds = [seconds_by_kind(point.plan) for point in points]
    bottom = np.zeros(len(points))
    for number, kind in enumerate(KINDS):
        seconds = np.array([one[kind] for one in kinds])
        colour = (*COLOURS, "#999999")[number]
        if seconds.any():
            upper.bar(places, seconds, bottom=bottom, color=colour, width=0.6, label=kind)
            if kind != "computation":
                total = np.array([point.plan.time.seconds.middle for point in points])
                lower.plot(places, 100 * seconds / total, color=colour, marker="o", markersize=4)
        bottom += seconds
    ends = np.array([[p.plan.time.seconds.low, p.plan.time.seconds.high] for p in points]).T
    middle = ends.mean(axis=0)
    upper.errorbar(places, middle, abs(ends - middle), fmt="none", ecolor=INK, capsize=3)
    upper.set_ylim(0, None)
    lower.set_ylim(0, None)
    tidy(upper, "seconds of a step")
    tidy(lower, "% of the step")
    lower.set_xticks(places, [str(point.world) for point in points])
    lower.set_xlabel("GPUs; the global batch grows with them", color=INK)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    return figure
