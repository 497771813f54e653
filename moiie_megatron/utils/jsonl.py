"""Files of one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moiie_megatron.utils.errors import UserError

Records = list[dict[str, Any]]  # in the order of the file


def read_records(path: str | Path) -> Records:
    """One JSON object per line; a last line without its end, which a kill left, is ignored.

    Raises:
        UserError: The file cannot be read, or a line is no JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"The log {path} cannot be read ({error}): name the output directory of a run."
        ) from error
    unfinished = lines.pop()  # empty behind a line that is complete
    if unfinished:
        try:
            json.loads(unfinished)
        except (ValueError, RecursionError):
            pass
        else:
            lines.append(unfinished)
    return [_record(path, number, line) for number, line in enumerate(lines, start=1)]


def broken_line(path: str | Path, number: int, problem: str) -> UserError:
    """The error about a line of a file.

    Args:
        path: The file.
        number: Of the line, from 1.
        problem: Completes "FILE, line NUMBER".
    """
    return UserError(
        f"{path}, line {number} {problem}: repair or delete the line, or name a file that this "
        "program wrote."
    )


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise broken_line(path, number, f"is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise broken_line(path, number, "is no JSON object")
    return record
