"""The style that all figures share, and how they are written to files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moiie_megatron.utils.files import write_output

DPI: Final = 150
INK: Final = "#333333"
GRID: Final = "#e4e4e4"
# The palette of Okabe and Ito, which people with any colour vision can tell apart.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Image tokens, both, text tokens, in every figure.
GROUP_COLOURS: Final = {"vision": "#e69f00", "shared": "#8c8c8c", "text": "#0072b2"}


def expert_colour(name: str, experts: Sequence[str]) -> tuple[float, float, float]:
    """The colour of the expert's group; later experts of a group are lighter.

    Args:
        name: The expert, such as ``shared.1``.
        experts: The names of all experts.
    """
    group, number = name.split(".")
    size = sum(other.split(".")[0] == group for other in experts)
    lighter = 0.45 * int(number) / max(size, 2)
    red, green, blue = (c + (1 - c) * lighter for c in to_rgb(GROUP_COLOURS[group]))
    return red, green, blue


def tidy(axes: Axes, ylabel: str) -> None:
    """Thin grid behind the data, no box."""
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, with space between its contents and its edges."""
    figure = Figure(figsize=(width, height), layout="constrained")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.1, h_pad=0.1)  # type: ignore[call-arg]
    return figure


def panel_title(axes: Axes, title: str) -> None:
    """A title at the left end of a panel."""
    axes.set_title(title, color=INK, fontsize=10.5, fontweight="bold", loc="left", pad=8)


def group_legend(figure: Figure, groups: Sequence[str]) -> None:
    """The colours of expert groups below all panels."""
    figure.legend(
        handles=[Patch(color=GROUP_COLOURS[g], label=f"{g} experts") for g in groups],
        loc="outside lower center",
        ncols=len(groups),
        frameon=False,
        labelcolor=INK,
    )


def save_png(figure: Figure, out: str | Path) -> Path:
    """Write the figure, in a directory that is created if needed.

    Raises:
        UserError: It cannot be written.
    """
    out = Path(out)
    with write_output(out) as file:
        figure.savefig(file, format="png", dpi=DPI)
    return out


def svg_data(figure: Figure) -> str:
    """The figure as a data URI for an ``img`` element; equal figures give equal texts.

    Letters are written as paths, so that the reader needs no font.
    """
    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": "moiie"}):
        figure.savefig(stream, format="svg", dpi=DPI, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
