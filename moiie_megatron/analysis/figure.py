"""The look that all figures share, and how they reach the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI: Final = 150
INK: Final = "#333333"
GRID: Final = "#e4e4e4"
# Okabe and Ito's palette: told apart with any colour vision.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def tidy(axes: Axes, ylabel: str) -> None:
    """Thin grid behind the data, no box."""
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def save_png(figure: Figure, out: str | Path) -> Path:
    """Write the figure beside ``out`` and rename it; the folder is made if needed."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".writing")
    figure.savefig(beside, format="png", dpi=DPI)
    os.replace(beside, out)
    return out
