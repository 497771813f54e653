"""Logs of one JSON object per line that read as if the run had never been interrupted."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import atomic_write

# Told why something could not be written.
LostFn = Callable[[str], None]


def refuse(sentence: str) -> None:
    """The ``LostFn`` of a program that cannot go on without its log.

    Raises:
        UserError: Always.
    """
    raise UserError(sentence)


def lost_sentence(path: Path, error: OSError) -> str:
    """Why a log could not be written, and what to do."""
    return (
        f"{path} could not be written ({error.strerror or error}): make room there, or change its "
        "permissions, and start again."
    )


class StepLines:
    """Appends records that have a ``step``; every line reaches the file at once.

    Args:
        path: The file; made if needed, with its directory.
        start_step: Step of the checkpoint that the run resumes from (0 at its first start):
            lines of later steps are dropped, and so is a line cut off by a kill.
        lost: Told about a line that could not be written.

    Raises:
        UserError: The file cannot be opened.
    """

    def __init__(self, path: Path, start_step: int, lost: LostFn = refuse) -> None:
        self._path, self._lost = path, lost
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in complete_lines(path) if line["step"] <= start_step]
            with atomic_write(path) as file:
                file.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(lost_sentence(path, error)) from error

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one line, or none of it."""
        try:
            _write_whole(self.file, record)
        except OSError as error:
            self._lost(lost_sentence(self._path, error))

    def close(self) -> None:
        """Close the file."""
        try:
            self.file.close()
        except OSError as error:  # network file systems write late
            self._lost(lost_sentence(self._path, error))


def append_line(path: Path, record: Mapping[str, Any], lost: LostFn = refuse) -> None:
    """Append one line to a file that is made if needed."""
    try:
        with path.open("ab", buffering=0) as file:
            _write_whole(file, record)
    except OSError as error:
        lost(lost_sentence(path, error))


def _write_whole(file: io.FileIO, record: Mapping[str, Any]) -> None:
    """Append a line, or nothing."""
    line = (json.dumps(record) + "\n").encode()
    size = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file up to the first line that is cut off; none without the file."""
    lines = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(text)
            except json.JSONDecodeError:
                break
            if not isinstance(record, dict) or "step" not in record:
                break
            lines.append(record)
    return lines
