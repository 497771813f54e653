"""The load of every expert over training: one row per expert, one column per routing record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moiie_megatron.analysis.figure import GROUP_COLOURS, INK, group_legend, new_figure, save_png
from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.routing_stats.expert_use import groups_of, short_name
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records

_MAX_NAMED_ROWS = 40  # with more, the names would overlap


def plot_load_map(records: Records, out: str | Path) -> Path:
    """Write the figure as PNG.

    Raises:
        UserError: See ``relative_loads``.
    """
    return save_png(load_map_figure(records), out)


def relative_loads(records: Records) -> np.ndarray:
    """Load of every expert divided by the mean of its layer, ``(records, layers, experts)``.

    1 is an even load, 0 an expert without tokens; a layer without tokens is 1 everywhere.

    Raises:
        UserError: No record, or records of different experts or layers.
    """
    shapes = {(tuple(record["experts"]), tuple(record["layers"])) for record in records}
    if len(shapes) != 1:
        raise UserError(
            f"The load map needs the routing records of one model, not of {len(shapes)}: "
            "use the routing.jsonl of one run."
        )
    loads = np.array(
        [
            [np.sum([layer[m]["load"] for m in MODALITIES], axis=0) for layer in layers]
            for layers in (record["layers"].values() for record in records)
        ],
        dtype=float,
    )
    means = loads.mean(axis=2, keepdims=True)
    return np.where(means > 0, loads / np.where(means > 0, means, 1), 1.0)


def load_map_figure(records: Records) -> Figure:
    """The figure of ``plot_load_map``; a column is as wide as the steps that its record covers."""
    loads = relative_loads(records)
    experts, layers = records[0]["experts"], list(records[0]["layers"])
    rows, highest = len(layers) * len(experts), _ceiling(loads)
    edges = [records[0]["step"] - records[0]["steps"], *(record["step"] for record in records)]
    height = min(max(3.0, 1.6 + 0.19 * rows), 11.0)
    figure = new_figure(7.0, height)
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        edges,
        np.arange(rows + 1),
        loads.reshape(len(records), rows).T,
        cmap="RdBu_r",
        norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=highest),
        rasterized=True,
    )
    axes.set_ylim(rows, 0)
    for number in range(1, len(layers)):
        axes.axhline(number * len(experts), color="white", linewidth=2)
    centres = [(number + 0.5) * len(experts) for number in range(len(layers))]
    axes.set_yticks(centres, layers)
    axes.set_ylabel("layer", color=INK)
    axes.set_xlabel("optimizer step", color=INK)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _name_rows(axes, experts * len(layers))
    bar = figure.colorbar(mesh, ax=axes, location="top", aspect=40, pad=0.02, shrink=0.7)
    bar.set_label("load of an expert / mean of its layer", color=INK)
    ticks = [0, 0.5, 1, (1 + highest) / 2, highest]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(colors=INK, length=0)
    bar.outline.set_visible(False)
    group_legend(figure, groups_of(experts))
    return figure


def _ceiling(loads: np.ndarray) -> float:
    """The load of the last colour, a multiple of 0.5 that at most 0.5 % of the loads exceed."""
    return max(2.0, float(np.ceil(np.percentile(loads, 99.5) * 2) / 2))


def _name_rows(axes: Axes, names: list[str]) -> None:
    """At the right end of every row a mark in the colour of its group, and its name if it fits."""
    for row, name in enumerate(names):
        colour = GROUP_COLOURS[name.split(".")[0]]
        mark = Rectangle(
            (1.006, row + 0.04),
            0.012,
            0.92,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
            color=colour,
            linewidth=0,
        )
        axes.add_patch(mark)
        if len(names) <= _MAX_NAMED_ROWS:
            axes.annotate(
                short_name(name),
                (1.018, row + 0.5),
                xycoords=axes.get_yaxis_transform(),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=colour,
                annotation_clip=False,
            )
