"""Files of one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moiie_megatron.utils.errors import UserError

Records = list[dict[str, Any]]  # in the order of the file


def read_records(path: str | Path) -> Records:
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
