"""Token pathways: which experts process image tokens and text tokens, layer by layer.

One panel per modality, one lane per expert; the width of the band in a lane is the fraction of
the modality's tokens that the expert processes in that layer (the paper's figure of routing).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moiie_megatron.analysis.figure import (
    GROUP_COLOURS,
    INK,
    expert_colour,
    group_legend,
    new_figure,
    panel_title,
    save_png,
)
from moiie_megatron.routing_stats.expert_use import (
    MODALITY_TITLES,
    ExpertUse,
    groups_of,
    short_name,
)

_LANE = 0.42  # inches
_HALF_BAND = 0.40  # of a lane: half the width of a band for a fraction of 1
_MAX_LABELLED_LAYERS = 12  # with more, the numbers beside the bands would overlap
_CURVE_POINTS = 24  # between two layers


def plot_pathways(use: ExpertUse, out: str | Path) -> Path:
    """Write the figure as PNG."""
    return save_png(pathways_figure(use), out)


def pathways_figure(use: ExpertUse) -> Figure:
    """One panel per modality that has tokens."""
    modalities, lanes = use.present(), len(use.experts)
    height = 1.15 + len(modalities) * (0.55 + _LANE * lanes)
    figure = new_figure(max(6.4, 1.6 + 0.36 * len(use.layers)), height)
    panels = figure.subplots(len(modalities), 1, sharex=True, squeeze=False)[:, 0]
    for axes, modality in zip(panels, modalities, strict=True):
        _panel(axes, use, modality)
    panels[-1].set_xlabel("layer", color=INK)
    group_legend(figure, groups_of(use.experts))
    return figure


def _panel(axes: Axes, use: ExpertUse, modality: str) -> None:
    layers = use.layers
    x = np.arange(len(layers), dtype=float)
    for expert, name in enumerate(use.experts):
        axes.axhline(expert, color="#dddddd", linewidth=0.8, zorder=0)
        if not use.is_allowed(expert, modality):
            continue
        fractions = np.array([use.fractions[modality][layer][expert] for layer in layers])
        along, half = _smooth(x, fractions * _HALF_BAND)
        axes.fill_between(
            along, expert - half, expert + half, color=expert_colour(name, use.experts), lw=0
        )
        if len(layers) > _MAX_LABELLED_LAYERS:
            continue
        for position, fraction in zip(x, fractions, strict=True):
            axes.text(
                position,
                expert - fraction * _HALF_BAND - 0.03,  # the axis points down
                f"{fraction:.0%}",
                ha="center",
                va="bottom",
                fontsize=8,
                color=INK,
            )
    panel_title(axes, f"{MODALITY_TITLES[modality]}: fraction processed by each expert")
    axes.set_yticks(range(len(use.experts)), [short_name(name) for name in use.experts])
    axes.tick_params(colors=INK, length=0)
    for label, name in zip(axes.get_yticklabels(), use.experts, strict=True):
        group = name.split(".")[0]
        label.set_color(GROUP_COLOURS[group] if group in (modality, "shared") else "#c8c8c8")
        label.set_fontweight("bold")
    axes.set_xticks(x, [str(layer) for layer in layers])
    axes.set_xlim(-0.45, len(layers) - 0.55)
    axes.set_ylim(len(use.experts) - 0.42, -0.62)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points joined by curves that are horizontal at every layer and beyond both ends."""
    x = np.concatenate([[x[0] - 0.35], x, [x[-1] + 0.35]])
    y = np.concatenate([[y[0]], y, [y[-1]]])
    ease = (1 - np.cos(np.linspace(0, np.pi, _CURVE_POINTS, endpoint=False))) / 2
    line = np.linspace(0, 1, _CURVE_POINTS, endpoint=False)
    along = [a + (b - a) * line for a, b in pairwise(x)]
    value = [a + (b - a) * ease for a, b in pairwise(y)]
    return np.append(np.concatenate(along), x[-1]), np.append(np.concatenate(value), y[-1])
