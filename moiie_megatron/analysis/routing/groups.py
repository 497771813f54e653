"""Fractions of intra-modality and of shared experts in the routing of every layer.

One panel per modality, one stacked bar per MoE layer, the colour of its group for each expert.
The paper concludes from it that low layers separate the modalities and high layers mix them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moiie_megatron.analysis.figure import (
    INK,
    expert_colour,
    group_legend,
    new_figure,
    panel_title,
    save_png,
    tidy,
)
from moiie_megatron.routing_stats.expert_use import (
    MODALITY_TITLES,
    ExpertUse,
    groups_of,
    short_name,
)

_MAX_LABELLED_LAYERS = 8  # beyond, numbers inside the bars would not be legible


def plot_groups(use: ExpertUse, out: str | Path) -> Path:
    """Write the figure as PNG."""
    return save_png(groups_figure(use), out)


def groups_figure(use: ExpertUse) -> Figure:
    """One panel per modality that has tokens; every bar sums to 1."""
    modalities = use.present()
    width = max(6.4, 1.6 + 0.42 * len(use.layers))
    figure = new_figure(width, 0.9 + 2.5 * len(modalities))
    panels = figure.subplots(len(modalities), 1, sharex=True, squeeze=False)[:, 0]
    for axes, modality in zip(panels, modalities, strict=True):
        _stack(axes, use, modality)
        panel_title(axes, f"{MODALITY_TITLES[modality]}: fraction of expert choices")
    panels[-1].set_xlabel("layer", color=INK)
    group_legend(figure, groups_of(use.experts))
    return figure


def _stack(axes: Axes, use: ExpertUse, modality: str) -> None:
    positions = np.arange(len(use.layers))
    bottom = np.zeros(len(use.layers))
    usable = [e for e in range(len(use.experts)) if use.is_allowed(e, modality)]
    # The modality's own experts below, the shared ones on top, in both panels.
    for expert in sorted(usable, key=lambda e: use.group(e) == "shared"):
        name = use.experts[expert]
        heights = np.array([use.fractions[modality][n][expert] for n in use.layers]) / use.top_k
        colour = expert_colour(name, use.experts)
        bars = axes.bar(
            positions, heights, 0.72, bottom, color=colour, edgecolor="white", linewidth=1.2
        )
        bottom += heights
        if len(use.layers) <= _MAX_LABELLED_LAYERS:
            axes.bar_label(
                bars,
                [f"{short_name(name)}  {h:.0%}" if h >= 0.07 else "" for h in heights],
                label_type="center",
                color="white",
                fontsize=8,
            )
    axes.set_xticks(positions, [str(layer) for layer in use.layers])
    tidy(axes, "")
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
