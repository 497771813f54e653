"""Data reports made by hand, for tests of what is planned from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moiie_megatron.data.audit.shapes import shape_histogram

Sizes = Sequence[tuple[int, int, int]]  # tokens, images and labels of samples


def report_values(
    *sources: Sizes, length: int = 64, image_tokens: int = 16, weights: Sequence[float] = ()
) -> dict[str, Any]:
    """What ``prepare_data.py validate`` writes, without what the planner does not read."""
    listed = []
    for number, sizes in enumerate(sources):
        tokens, images, labels = np.array(sizes).T
        listed.append(
            {
                "name": f"source {number}",
                "weight": weights[number] if weights else 1.0,
                "samples": len(sizes),
                "shapes": shape_histogram(tokens, images, labels, length),
            }
        )
    return {
        "encoding": {"sequence_length": length, "num_image_tokens": image_tokens},
        "sources": listed,
    }


def write_report(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path
