"""Reads what a run logged (``metrics.jsonl``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]  # one per optimizer step


def read_metrics(path: str | Path) -> Records:
    """The steps of a run, in order; a last line cut off by a kill is left out.

    Raises:
        ValueError: The file cannot be read, holds no step, or is damaged before its end.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The metrics {path} cannot be read ({error}).") from error
    records: Records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is no JSON ({error}).") from error
    if not records:
        raise ValueError(f"{path} holds no steps yet: train first.")
    return records
