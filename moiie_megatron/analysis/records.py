"""Read the metrics of a run, ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records, read_records


def read_metrics(path: str | Path) -> Records:
    """The lines of ``metrics.jsonl``, in order; an incomplete last line is ignored.

    Raises:
        UserError: The file cannot be read, has no step, or has a broken line before its last.
    """
    records = read_records(path)
    if not records:
        raise UserError(f"{path} has no steps yet: train first.")
    return records
