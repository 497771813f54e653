"""Reads what a run logged about its steps: ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records, read_records


def read_metrics(path: str | Path) -> Records:
    """The lines of ``metrics.jsonl``, in order; a last line cut off by a kill is dropped.

    Raises:
        UserError: The file cannot be read, holds no step, or is damaged before its end.
    """
    records = read_records(path)
    if not records:
        raise UserError(f"{path} holds no steps yet: train first.")
    return records
