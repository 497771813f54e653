"""Writes records as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    check_new_lines(out)
    file = RecordFile(records)
    write_lines(file, range(len(file)), out, progress)
    return len(file)


def check_new_lines(out: Path) -> None:
    """Check the name of a file of JSON lines to write.

    Raises:
        UserError: It exists, or has another suffix than ``.jsonl``.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}: use a name that ends in .jsonl.")
    if out.exists():
        raise UserError(f"{out} exists: remove it, or choose another name with --out.")


def write_lines(
    file: RecordFile, indices: Sequence[int], out: Path, progress: ProgressFn | None = None
) -> None:
    """Write some of the records of a file as lines, as they stand there.

    Args:
        indices: Numbers of the records.
        out: A new file; it appears when it is complete.
        progress: Called with the records done and their total.

    Raises:
        UserError: ``out`` cannot be written, or a record is not JSON.
    """
    try:
        with atomic_write(out) as beside, beside.open("wb") as lines:
            for done, i in enumerate(indices, start=1):
                lines.write(_line(file.value(i)))
                if progress is not None and (done % 1000 == 0 or done == len(indices)):
                    progress(done, len(indices))
    except OSError as error:
        raise UserError(
            f"Cannot write {out} ({error.strerror or error}): choose another file with --out."
        ) from error


def _line(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only write as an escape
        return (json.dumps(value, separators=(",", ":")) + "\n").encode()
