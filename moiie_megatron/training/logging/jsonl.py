"""Logs of one JSON object per line that read as if a run had never been interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StepLines:
    """Appends records that have a ``step``; every line reaches the file at once.

    Args:
        path: The file; made if needed, with its folder.
        start_step: Step of the checkpoint that the run goes on from (0 at the start): lines after
            it are dropped, and so is one that a kill has cut off.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in complete_lines(path) if line["step"] <= start_step]
        beside = path.with_name(path.name + ".writing")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, path)
        self.file = path.open("a", buffering=1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one line."""
        self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; a line cut off by a kill is dropped."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
