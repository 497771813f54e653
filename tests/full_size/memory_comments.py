"""The memory figures in comments of the shipped configurations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from tests.helpers.launch import ROOT

EXAMPLES: Final = ROOT / "examples/configs"
_LINE: Final = re.compile(
    r"^# +(?:([a-z]+) (\d+), )?(\d+) GPUs: +([\d.]+) GiB of states"
    r"(?:, +([\d.]+) GiB of activations)?$",
    re.MULTILINE,
)


class Figures(NamedTuple):
    """A line such as ``# 8 GPUs: 41.4 GiB of states, 22.1 GiB of activations``.

    Attributes:
        overrides: Of another layout: ``# expert 4, 8 GPUs: 34.7 GiB of states``.
        world: Number of GPUs.
        states: GiB of weights, gradients and optimizer states.
        activations: GiB at the peak, if the line says them.
    """

    overrides: tuple[str, ...]
    world: int
    states: float
    activations: float | None


def read_figures(path: Path) -> list[Figures]:
    return [
        Figures(
            (f"parallel.{name}={degree}",) if name else (),
            int(world),
            float(states),
            float(activations) if activations else None,
        )
        for name, degree, world, states, activations in _LINE.findall(path.read_text())
    ]
