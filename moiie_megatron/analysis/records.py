"""Read the logs of a run: ``metrics.jsonl``, ``routing.jsonl`` and other JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moiie_megatron.routing_stats.record import VERSION
from moiie_megatron.utils.errors import UserError

Records = list[dict[str, Any]]  # in the order of training


def read_metrics(path: str | Path) -> Records:
    """The lines of ``metrics.jsonl``, in order; an incomplete last line is ignored.

    Raises:
        UserError: The file cannot be read, has no step, or has a broken line before its last.
    """
    records = read_lines(path)
    if not records:
        raise UserError(f"{path} has no steps yet: train first.")
    return records


def read_routing(path: str | Path) -> Records:
    """The records of ``routing.jsonl`` (``routing_stats/record.py``), in order.

    Raises:
        UserError: As ``read_metrics``, or a record of another version.
    """
    records = read_lines(path)
    if not records:
        raise UserError(f"{path} has no routing records: name a run with experts.")
    for record in records:
        if record.get("version") != VERSION:
            raise UserError(
                f"{path} has a routing record of version {record.get('version')}, but this program "
                f"reads version {VERSION}: use the version that wrote it."
            )
    return records


def newest(records: Records, steps: int) -> Records:
    """The last routing records that cover at least this many steps (all, if there are fewer)."""
    covered, start = 0, len(records)
    while start and covered < steps:
        start -= 1
        covered += records[start].get("steps", 1)
    return records[start:]


def read_lines(path: str | Path) -> Records:
    """One JSON object per line; a last line that a kill left incomplete is ignored.

    Raises:
        UserError: The file cannot be read, or has a broken line before its last.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The log {path} cannot be read ({error}): name the output directory of a run."
        ) from error
    records: Records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number} is not JSON ({error}): repair or delete the line."
                ) from error
    return records
