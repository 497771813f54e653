"""Answers written as they come, so that the same command goes on after an interruption.

lmms-eval's own cache (``--use_cache``) writes when the last request of a task has been answered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        text: Empty if the request has failed.
        error: Why it has failed; empty if it has not.
    """

    text: str
    error: str = ""


class KeptAnswers:
    """The answers of one task, in a file of one JSON object per line.

    Args:
        path: Its directory exists; None keeps nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._answers = {} if self._path is None else read_answers(self._path)

    def get(self, key: str) -> Answer | None:
        """The answer to a request; None if it must be asked (again)."""
        answer = self._answers.get(key)
        return None if answer is None or answer.error else answer

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep the answers of a batch."""
        self._answers.update(answers)
        if self._path is None:
            return
        lines = (json.dumps({"key": key, **asdict(value)}) for key, value in answers.items())
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def read_answers(path: Path) -> dict[str, Answer]:
    """The answers in a file, by the request's key; the last one counts.

    An incomplete last line, which a kill leaves, is cut off.
    """
    if not path.exists():
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(len(line) for line in lines[:-1]))
        del lines[-1]
    values = map(json.loads, lines)
    return {value["key"]: Answer(value["text"], value["error"]) for value in values}


def request_key(parts: Iterable[Hashable], settings: Mapping[str, Any]) -> str:
    """Names a request: the task, the row, what is asked, and how the answer is generated."""
    text = "\0".join([*map(str, parts), json.dumps(settings, sort_keys=True, default=str)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
