"""Routing records made by hand, for tests of what is drawn from them."""

from __future__ import annotations

from typing import Any

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import Placement
from moiie_megatron.routing_stats.load_stats import LayerSums
from moiie_megatron.routing_stats.record import routing_record

LAYOUT = ExpertLayout(1, 2, 1)  # V0 S0 S1 T0
PLACEMENT = Placement((0, 3, 1, 2), 2, 1.0, True)


def record(
    step: int,
    vision: list[int],
    text: list[int],
    *,
    steps: int = 10,
    layers: tuple[int, ...] = (3, 11),
) -> dict[str, Any]:
    """Ten tokens of each modality in every layer (none where the loads are zero).

    Args:
        vision: Load by expert of image tokens; adds up to 20.
        text: The same of text tokens.
    """
    tokens = [10 * any(load) for load in (vision, text)]
    prob = [[part / 2 for part in load] for load in (vision, text)]
    sums = LayerSums(tokens, [vision, text], prob, [15, 15, 32], [7, 8, 16])
    values = routing_record(dict.fromkeys(layers, sums), LAYOUT, PLACEMENT, row_bytes=100)
    return {"step": step, "steps": steps, **values}


RECORDS = [
    record(10, [10, 10, 0, 0], [0, 5, 5, 10]),
    record(20, [2, 10, 8, 0], [0, 5, 5, 10]),
    record(25, [6, 10, 4, 0], [0, 5, 5, 10], steps=5),
]
