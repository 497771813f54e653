"""Converts a JSON array of records to JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import atomic_write
from moiie_megatron.utils.progress import ProgressFn


def array_to_lines(records: Path, out: Path, progress: ProgressFn | None = None) -> int:
    """Write every element of a JSON array as a line, with one element in memory at a time.

    Args:
        records: A ``.json`` file.
        out: A new ``.jsonl`` file; it appears when it is complete.
        progress: Called with the records done and their total.

    Returns:
        Number of lines written.

    Raises:
        UserError: ``records`` is not a JSON array, ``out`` exists, has another suffix than
            ``.jsonl`` or cannot be written.
    """
    if records.suffix != ".json":
        raise UserError(f"{records} is not a .json array: only an array needs to be converted.")
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}: use a name that ends in .jsonl.")
    if out.exists():
        raise UserError(f"{out} exists: remove it, or choose another name with --out.")
    file = RecordFile(records)
    try:
        with atomic_write(out) as beside, beside.open("wb") as lines:
            for i in range(len(file)):
                lines.write(_line(file.value(i)))
                if progress is not None and (i % 1000 == 999 or i + 1 == len(file)):
                    progress(i + 1, len(file))
    except OSError as error:
        raise UserError(
            f"Cannot write {out} ({error.strerror or error}): choose another file with --out."
        ) from error
    return len(file)


def _line(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only write as an escape
        return (json.dumps(value, separators=(",", ":")) + "\n").encode()
