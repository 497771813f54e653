"""Curves of losses, rates and evaluations over the steps of one or several stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter

from moiie_megatron.analysis.figure import COLOURS, GROUP_COLOURS, INK, new_figure, save_png, tidy
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records

_SIZE = (9.0, 7.0)  # inches
_PARTS = {
    "vision": GROUP_COLOURS["vision"],
    "connector": COLOURS[2],
    "language": GROUP_COLOURS["text"],
    "moe": COLOURS[3],
}
_ROUTERS = {
    "vision": GROUP_COLOURS["vision"],
    "text": GROUP_COLOURS["text"],
    "joint": GROUP_COLOURS["shared"],
}
_RATES = {
    "tokens_per_second": ("tokens per second", COLOURS[2]),
    "mfu": ("MFU", COLOURS[0]),
    "data_wait_fraction": ("data wait", COLOURS[1]),
}


def plot_curves(stages: Mapping[str, Records], out: str | Path) -> Path:
    """Write the language-model loss, balance losses and learning rates of all stages as PNG.

    Args:
        stages: The metrics of each stage by name, in the order of training.
        out: The file.

    Raises:
        UserError: No stage, or one without steps.
    """
    if not stages or not all(stages.values()):
        raise UserError(f"There are no steps to plot in the stages {list(stages)}: train first.")
    figure = curves_figure(stages)
    return save_png(figure, out)


def curves_figure(stages: Mapping[str, Records], size: tuple[float, float] = _SIZE) -> Figure:
    """The figure of ``plot_curves``; panels: loss, balance loss (if logged), learning rate.

    Args:
        size: Width and height in inches.
    """
    routers = [r for r in _ROUTERS if _has(stages, f"aux_{r}")]
    figure = new_figure(*size)
    heights = [3.0, 1.2, 1.2] if routers else [3.0, 1.2]
    panels: Sequence[Axes] = figure.subplots(
        len(heights), 1, sharex=True, height_ratios=heights
    ).tolist()
    loss, rates = panels[0], panels[-1]

    _curve(loss, stages, "lm_loss", COLOURS[0], smooth=True)
    _log_scale(loss)
    tidy(loss, "loss per answer token")
    for router in routers:
        _curve(panels[1], stages, f"aux_{router}", _ROUTERS[router], label=f"{router} router")
    if routers:
        tidy(panels[1], "balance loss")
        _legend_above(panels[1])
    # Parts often have equal rates: earlier curves are wider, so that later ones do not hide them.
    parts = [part for part in _PARTS if _has(stages, f"lr_{part}")]
    for number, part in enumerate(parts):
        width = 1.5 + 1.5 * (len(parts) - 1 - number)
        _curve(rates, stages, f"lr_{part}", _PARTS[part], label=part, width=width)
    tidy(rates, "learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _legend_above(rates)
    rates.set_ylim(bottom=0)
    rates.set_xlabel("optimizer step, all stages", color=INK)
    _mark_stages(panels, stages)
    return figure


def step_figure(stages: Mapping[str, Records], size: tuple[float, float]) -> Figure:
    """Panels of tokens per second, MFU and data wait (if logged), and gradient norm.

    Args:
        stages: As in ``plot_curves``.
        size: Width in inches, and height of two panels.
    """
    rates = [key for key in _RATES if key == "tokens_per_second" or _has(stages, key)]
    count = len(rates) + 1
    figure = new_figure(size[0], size[1] * count / 2)
    panels: Sequence[Axes] = figure.subplots(count, 1, sharex=True).tolist()
    for axes, key in zip(panels, rates, strict=False):
        title, colour = _RATES[key]
        _curve(axes, stages, key, colour, smooth=True)
        tidy(axes, title)
        axes.set_ylim(bottom=0)
        if key != "tokens_per_second":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _curve(panels[-1], stages, "grad_norm", COLOURS[3], smooth=True)
    _log_scale(panels[-1])
    tidy(panels[-1], "gradient norm")
    panels[-1].set_xlabel("optimizer step, all stages", color=INK)
    _mark_stages(panels, stages)
    return figure


def evaluation_figure(
    stages: Mapping[str, Records], scores: Mapping[str, Records], size: tuple[float, float]
) -> Figure:
    """What evaluations while training have found: one curve per set or task.

    Args:
        stages: As in ``plot_curves``.
        scores: For each stage records with ``step`` and a value (0..1) for every name.
        size: Width and height in inches.
    """
    names = list(dict.fromkeys(k for rs in scores.values() for r in rs for k in r if k != "step"))
    figure = new_figure(*size)
    axes = figure.subplots()
    for number, name in enumerate(names):
        _marked_curve(axes, stages, scores, name, COLOURS[number % len(COLOURS)])
    tidy(axes, "score")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step, all stages", color=INK)
    axes.legend(frameon=False, labelcolor=INK)
    _mark_stages([axes], stages)
    return figure


def validation_figure(
    stages: Mapping[str, Records], losses: Mapping[str, Records], size: tuple[float, float]
) -> Figure:
    """The loss on held-out samples over that of training; below it that of their parts, if any.

    Args:
        stages: As in ``plot_curves``.
        losses: For each stage the curves of ``analysis/validations.py``.
        size: Width in inches, and height of one panel.
    """
    names = list(dict.fromkeys(k for rs in losses.values() for r in rs for k in r if k != "step"))
    whole, parts = names[:1], names[1:]
    count = 2 if parts else 1
    figure = new_figure(size[0], size[1] * count)
    panels: Sequence[Axes] = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0].tolist()
    _curve(panels[0], stages, "lm_loss", COLOURS[0], smooth=True, label="training")
    for name in whole:
        _marked_curve(panels[0], stages, losses, name, COLOURS[1], label="validation")
    tidy(panels[0], "loss per answer token")
    for number, name in enumerate(parts):
        _marked_curve(panels[-1], stages, losses, name, COLOURS[number % len(COLOURS)])
    if parts:
        tidy(panels[-1], "validation loss")
    for axes in panels:
        _log_scale(axes)
        _legend_above(axes)
    panels[-1].set_xlabel("optimizer step, all stages", color=INK)
    _mark_stages(panels, stages)
    return figure


def _marked_curve(
    axes: Axes,
    stages: Mapping[str, Records],
    curves: Mapping[str, Records],
    name: str,
    colour: str,
    *,
    label: str | None = None,
) -> None:
    """One line per stage that has values of this name, with a marker at each."""
    start = 0
    label = label or name
    for stage, records in stages.items():
        points = [(start + r["step"], r[name]) for r in curves[stage] if name in r]
        if points:
            steps, values = np.array(points, dtype=float).T
            is_first = label not in axes.get_legend_handles_labels()[1]
            axes.plot(
                steps,
                values,
                color=colour,
                linewidth=1.8,
                marker="o",
                markersize=3.5,
                label=label if is_first else None,
            )
        start += records[-1]["step"]


def _log_scale(axes: Axes) -> None:
    """A logarithmic axis with numbers such as 0.5 instead of powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_above(axes: Axes) -> None:
    """A legend of one row above the panel, where it hides no curve."""
    axes.legend(
        frameon=False,
        ncols=4,
        loc="lower right",
        bbox_to_anchor=(1.0, 0.97),
        borderpad=0.1,
        handlelength=1.4,
        columnspacing=1.2,
        labelcolor=INK,
    )


def _has(stages: Mapping[str, Records], key: str) -> bool:
    return any(key in record for records in stages.values() for record in records)


def _curve(
    axes: Axes,
    stages: Mapping[str, Records],
    key: str,
    colour: str,
    *,
    label: str | None = None,
    smooth: bool = False,
    width: float = 1.8,
) -> None:
    """One line per stage that logged ``key``; ``smooth``: a running median over the raw values."""
    start = 0
    for records in stages.values():
        points = [(start + r["step"], r[key]) for r in records if key in r]
        if points:
            steps, values = np.array(points, dtype=float).T
            if smooth:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
                values = running_median(values)
            axes.plot(steps, values, color=colour, linewidth=width, label=label)
            label = None  # one entry in the legend
        start += records[-1]["step"]


def running_median(values: np.ndarray) -> np.ndarray:
    """Median over a window of 1/25 of the curve (at least 3 points), shorter at its ends."""
    half = max(1, len(values) // 50)
    return np.array(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def _mark_stages(panels: Sequence[Axes], stages: Mapping[str, Records]) -> None:
    start = 0
    for number, (name, records) in enumerate(stages.items()):
        end = start + records[-1]["step"]
        for axes in panels:
            if number % 2:
                axes.axvspan(start, end, color="#f4f4f4", zorder=0, linewidth=0)
        panels[0].annotate(
            name,
            ((start + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontweight="bold",
            parse_math=False,
        )
        start = end
    panels[0].set_xlim(0, start)
