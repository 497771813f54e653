"""Reads ``routing.jsonl``."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.routing_stats.record import VERSION
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records, read_records


def read_routing(path: str | Path) -> Records:
    """The records of ``routing.jsonl`` (``routing_stats/record.py``), in order.

    Raises:
        UserError: The file cannot be read, is damaged before its end, holds no record, or one
            of another version.
    """
    records = read_records(path)
    if not records:
        raise UserError(f"{path} holds no routing records: only runs with experts write some.")
    for record in records:
        if record.get("version") != VERSION:
            raise UserError(
                f"{path} has a routing record of version {record.get('version')}, this program "
                f"reads version {VERSION}: use the program that wrote it."
            )
    return records


def newest(records: Records, steps: int) -> Records:
    """The last records that cover at least this many steps (all, if there are fewer)."""
    covered, start = 0, len(records)
    while start and covered < steps:
        start -= 1
        covered += records[start].get("steps", 1)
    return records[start:]
