"""Logs of one JSON object per line that read as if the run had never been interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moiie_megatron.utils.files import atomic_write


class StepLines:
    """Appends records that have a ``step``; every line reaches the file at once.

    Args:
        path: The file; made if needed, with its directory.
        start_step: Step of the checkpoint that the run resumes from (0 at its first start):
            lines of later steps are dropped, and so is a line cut off by a kill.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in complete_lines(path) if line["step"] <= start_step]
        with atomic_write(path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a", buffering=1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one line."""
        self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file up to the first line that is cut off; none without the file."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
