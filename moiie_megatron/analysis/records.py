"""Read the metrics of a run, ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moiie_megatron.config.messages import show
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records, broken_line, read_records

_AMOUNTS = (
    "seconds",
    "tokens_per_second",
    "tokens",
    "tflops_per_rank",
    "mfu",
    "data_wait_fraction",
)


def read_metrics(path: str | Path, keys: Sequence[str] = ()) -> Records:
    """The lines of ``metrics.jsonl``, in order; a last line without its end is ignored.

    Losses and gradient norms may be NaN or infinite, as those of skipped steps are.

    Args:
        path: The file.
        keys: What every line must hold besides ``step``.

    Raises:
        UserError: The file cannot be read, has no step, or has a line that is not one of metrics.
    """
    records = read_records(path)
    if not records:
        raise UserError(f"{path} has no steps yet: train first.")
    for number, record in enumerate(records, start=1):
        for key in ("step", *keys):
            if key not in record:
                raise broken_line(path, number, f"has no {key}")
        step = record["step"]
        if type(step) is not int or step < 1:
            raise broken_line(path, number, f"has {show(step)} as step")
        for key, value in record.items():
            if not _is_number(value) or (key in _AMOUNTS and not 0 <= value < 1e12):
                raise broken_line(path, number, f"has {show(value)} as {key}")
    return records


def _is_number(value: object) -> bool:
    """Whether it is what a line holds; not a whole number that no float can be."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
