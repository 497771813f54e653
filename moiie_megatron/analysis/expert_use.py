"""Which experts the tokens of each modality use, by layer, from metrics to one PNG.

This is the paper's picture of expert activation: do image tokens keep to the vision experts, do
both modalities meet in the shared ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moiie_megatron.analysis.figure import INK, save_png, tidy
from moiie_megatron.analysis.records import Records
from moiie_megatron.experts.layout import ExpertLayout, Router

_GROUP_COLOURS = {"vision": "#e69f00", "shared": "#8c8c8c", "text": "#0072b2"}
_TITLES: dict[Router, str] = {
    "vision": "image tokens",
    "text": "text tokens",
    "joint": "all tokens",
}
_MAX_LABELLED_LAYERS = 12  # beyond, numbers inside the bars would not be legible


def mean_shares(records: Records, last: int = 50) -> dict[str, dict[int, np.ndarray]]:
    """Share of a router's choices that each expert got, averaged over the last steps.

    Args:
        records: Steps with ``expert_share`` (a token's top-k choices add up to k).
        last: How many steps to average.

    Returns:
        Router -> layer -> shares ``(E,)`` in logical order, which add up to 1.

    Raises:
        ValueError: No step holds routing statistics.
    """
    shares = [record["expert_share"] for record in records[-last:] if record.get("expert_share")]
    if not shares:
        raise ValueError("The metrics hold no expert_share: plot the use of experts of a MoE run.")
    result: dict[str, dict[int, np.ndarray]] = {}
    for layer in sorted(shares[-1], key=int):
        for router in shares[-1][layer]:
            total = np.sum([share[layer][router] for share in shares], axis=0)
            # A modality that never came up has no choices to share out.
            result.setdefault(router, {})[int(layer)] = total / (total.sum() or 1.0)
    return result


def plot_expert_use(
    records: Records, layout: ExpertLayout, out: str | Path, *, last: int = 50
) -> Path:
    """One panel per modality, one stacked bar per MoE layer, one colour per expert group.

    Args:
        records: Steps of a MoE run.
        layout: Its experts.
        out: PNG file.
        last: How many of the last steps to average.

    Raises:
        ValueError: No routing statistics, or another number of experts than the layout has.
    """
    return save_png(expert_use_figure(mean_shares(records, last), layout), out)


def expert_use_figure(shares: dict[str, dict[int, np.ndarray]], layout: ExpertLayout) -> Figure:
    """The figure of ``plot_expert_use`` from ``mean_shares``; one axes per router."""
    widths = {len(share) for layers in shares.values() for share in layers.values()}
    if widths != {layout.num_experts}:
        raise ValueError(
            f"The metrics have {sorted(widths)} experts, the layout {layout.num_experts}: give "
            "the configuration of the same run."
        )
    layers = len(next(iter(shares.values())))
    width = max(6.5, 2.0 + 0.55 * layers * len(shares))
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for axes, (router, by_layer) in zip(panels, shares.items(), strict=True):
        _stack(axes, by_layer, layout)
        axes.set_title(_TITLES[router], color=INK, fontweight="bold")  # type: ignore[index]
        axes.set_xlabel("layer", color=INK)
    panels[0].set_ylabel("share of expert choices", color=INK)
    groups = dict.fromkeys(layout.name(e).split(".")[0] for e in range(layout.num_experts))
    figure.legend(
        handles=[Patch(color=_GROUP_COLOURS[g], label=f"{g} experts") for g in groups],
        loc="outside lower center",
        ncols=len(groups),
        frameon=False,
    )
    return figure


def _stack(axes: Axes, by_layer: dict[int, np.ndarray], layout: ExpertLayout) -> None:
    positions = np.arange(len(by_layer))
    bottom = np.zeros(len(by_layer))
    for expert in range(layout.num_experts):
        heights = np.array([share[expert] for share in by_layer.values()])
        colour = _shade(layout, expert)
        bars = axes.bar(
            positions, heights, 0.72, bottom, color=colour, edgecolor="white", linewidth=1.2
        )
        bottom += heights
        if len(by_layer) <= _MAX_LABELLED_LAYERS:
            name = layout.name(expert)
            axes.bar_label(
                bars,
                [f"{_short(name)}  {h:.0%}" if h >= 0.04 else "" for h in heights],
                label_type="center",
                color="white",
                fontsize=8,
            )
    axes.set_xticks(positions, [str(layer) for layer in by_layer])
    tidy(axes, "")
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _shade(layout: ExpertLayout, expert: int) -> tuple[float, float, float]:
    """The colour of the group; later experts of a group are lighter."""
    group, number = layout.name(expert).split(".")
    sizes = {"vision": layout.num_vision, "shared": layout.num_shared, "text": layout.num_text}
    lighter = 0.45 * int(number) / max(sizes[group], 2)
    red, green, blue = (c + (1 - c) * lighter for c in to_rgb(_GROUP_COLOURS[group]))
    return red, green, blue


def _short(name: str) -> str:
    """``shared.1`` -> ``S1``."""
    group, number = name.split(".")
    return group[0].upper() + number
