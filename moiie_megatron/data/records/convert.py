"""Records into other containers: a JSON array into JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.utils.errors import UserError


def array_to_lines(
    records: Path, out: Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """Write every element of a JSON array as a line; one element at a time is in memory.

    Args:
        out: Gets its name only when it is complete.

    Returns:
        Lines written.

    Raises:
        UserError: ``records`` is no JSON array, ``out`` is there already, has another suffix than
            ``.jsonl`` or cannot be written.
    """
    if records.suffix != ".json":
        raise UserError(f"{records} is not a .json array: nothing to convert.")
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}: use a name that ends in .jsonl.")
    if out.exists():
        raise UserError(f"{out} exists: remove it, or choose another name with --out.")
    file = RecordFile(records)
    beside = out.with_name(out.name + ".writing")
    try:
        with beside.open("wb") as lines:
            for i in range(len(file)):
                lines.write(_line(file.value(i)))
                if progress is not None and (i % 1000 == 999 or i + 1 == len(file)):
                    progress(i + 1, len(file))
        os.replace(beside, out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"Cannot write {out}: {error.strerror or error}.") from error
    return len(file)


def _line(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can express
        return (json.dumps(value, separators=(",", ":")) + "\n").encode()
