"""``OUTPUT/evaluation.jsonl``: what evaluated checkpoints have scored, one line per set or task.

Whoever evaluates appends to it (``evaluation/watch/``), on this machine or another; the run and
reports read it.  A line has

- ``step``: of the checkpoint;
- ``name``, ``metric``, ``value``: the set or task and its score; of a set the ``accuracy`` of exact
  matches (0..1), of a task what its benchmark reports (0..1 where that is a percentage);
- ``questions``, ``errors``: how many were asked, and how many of them could not be;
- ``seconds``: what it took;
- ``id``: digest of the checkpoint's files, the questions and the limits.

A run that was set back evaluates a step again: the last line of a step and name counts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from moiie_megatron.training.logging.jsonl import LostFn, append_line, refuse

EVALUATION_FILE: Final = "evaluation.jsonl"


@dataclass(frozen=True)
class Evaluated:
    """One line; see the module."""

    step: int
    name: str
    metric: str
    value: float
    questions: int
    errors: int
    seconds: float
    id: str

    @property
    def scalar(self) -> str:
        """Its name in TensorBoard."""
        return f"evaluation/{self.name}/{self.metric}"

    @property
    def shown(self) -> str:
        """The value for people."""
        return f"{self.value:.1%}" if 0 <= self.value <= 1 else f"{self.value:.1f}"

    def __str__(self) -> str:
        failed = f", {self.errors} could not be asked" if self.errors else ""
        return (
            f"evaluation of step {self.step} | {self.name} {self.metric} {self.shown} "
            f"({self.questions} questions{failed}, {self.seconds:.0f} s)"
        )


def append_evaluated(output: str | Path, result: Evaluated, lost: LostFn = refuse) -> None:
    """Add a line, or nothing.

    Raises:
        UserError: It cannot be written (default of ``lost``).
    """
    append_line(Path(output) / EVALUATION_FILE, asdict(result), lost)


def read_evaluated(output: str | Path) -> list[Evaluated]:
    """All results, by step and in the order of the file; the last one of each step and name.

    Lines that are no results are left out: a kill may have cut one off.
    """
    latest = {(one.step, one.name): one for one in _read(Path(output) / EVALUATION_FILE)}
    return sorted(latest.values(), key=lambda one: one.step)


class NewResults:
    """Follows the file while it grows.

    Args:
        output: The output directory of the run.
    """

    def __init__(self, output: str | Path) -> None:
        self._file = Path(output) / EVALUATION_FILE
        self._seen = 0  # bytes

    def read(self) -> list[Evaluated]:
        """The results since the last call, whose lines are complete."""
        try:
            if self._file.stat().st_size <= self._seen:
                return []
            with self._file.open("rb") as file:
                file.seek(self._seen)
                text = file.read()
        except OSError:  # not there yet, or out of reach for a while
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._seen += len(complete)
        return _results(complete)


def _read(file: Path) -> list[Evaluated]:
    try:
        return _results(file.read_bytes())
    except FileNotFoundError:
        return []


def _results(text: bytes) -> list[Evaluated]:
    found = []
    for line in text.splitlines():
        try:
            value: Any = json.loads(line)
            result = Evaluated(**value)
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(result.step, int) and isinstance(result.value, int | float):
            found.append(result)
    return found
