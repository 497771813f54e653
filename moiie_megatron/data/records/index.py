"""Where the records of a file lie: byte ranges, found in one pass and kept beside large files.

Reading a file of a million records takes a while, and every process of a run needs the ranges.
So those of a large file are written to ``NAME.ranges.npy`` beside it: the first process of a node
finds them, all of them map the same pages of memory.  Where the folder cannot be written to,
every process finds them for itself.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from moiie_megatron.utils.errors import UserError

KEPT_FROM: Final = 16 << 20  # bytes; smaller files are read in a fraction of a second
_CHUNK = 4 << 20
_LONGEST_RECORD = 64 << 20  # characters
_MARK = "\ufeff"  # byte order mark
_SPACE = re.compile(r"[ \t\r\n]*")


def record_ranges(path: Path, kept_from: int = KEPT_FROM) -> np.ndarray:
    """int64 [n, 2]: the first byte of every record, and the byte behind it.

    Args:
        path: ``.json`` is an array, anything else has one record per line that is not blank.
        kept_from: Size in bytes from which the ranges are kept in a file.

    Raises:
        OSError: The file cannot be read.
        UserError: It is not a JSON array of UTF-8 text.
    """
    if path.stat().st_size < kept_from:
        return _find(path)
    with _alone(path):
        stamp = _stamp(path)  # before the search: a file that changes meanwhile will not match
        kept = open_ranges(path)
        if kept is None:
            found = _find(path)
            _keep(path, stamp, found)
            kept = open_ranges(path)
        return found if kept is None else kept


def ranges_file(path: Path) -> Path:
    """Where the ranges of a record file are kept."""
    return path.with_name(path.name + ".ranges.npy")


def open_ranges(path: Path) -> np.ndarray | None:
    """The ranges that are kept for a record file; None if there are none for what it holds now."""
    try:
        table = np.load(ranges_file(path), mmap_mode="r")
    except (OSError, ValueError, EOFError):  # none, or torn by something else than this program
        return None
    fits = table.dtype == np.int64 and table.ndim == 2 and table.shape[1] == 2 and len(table)
    return table[1:] if fits and tuple(table[0]) == _stamp(path) else None


def _find(path: Path) -> np.ndarray:
    flat = array("q")
    for start, end in _array_ranges(path) if path.suffix == ".json" else _line_ranges(path):
        flat.append(start)
        flat.append(end)
    return (
        np.frombuffer(flat, dtype=np.int64).reshape(-1, 2) if flat else np.empty((0, 2), np.int64)
    )


def _keep(path: Path, stamp: tuple[int, int], ranges: np.ndarray) -> None:
    """Write size and time of the record file and the ranges, if the folder allows it."""
    final = ranges_file(path)
    beside = final.with_name(f"{final.name}.writing{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.save(file, np.concatenate([np.array([stamp], dtype=np.int64), ranges]))
        os.replace(beside, final)
    except OSError:
        beside.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of a node at a time, where the file system has locks."""
    with path.open("rb") as file:
        # NFS locks files that are open for writing only; then all of them search.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _line_ranges(path: Path) -> Iterator[tuple[int, int]]:
    position = 0
    with path.open("rb") as file:
        for line in file:
            skipped = len(codecs.BOM_UTF8) if line.startswith(codecs.BOM_UTF8) else 0
            if line[skipped:].strip():
                yield position + skipped, position + len(line)
            position += len(line)


def _array_ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Ranges of the elements of a JSON array; the parsed elements are thrown away."""
    with path.open("rb") as file:
        window = _Window(file)
        count = 0
        try:
            if window.peek() == _MARK:
                window.advance(1)
            if window.peek_behind_space() != "[":
                raise UserError(
                    f"{path} is not a JSON array: one object per line belongs in a .jsonl."
                )
            window.advance(1)
            while window.peek_behind_space() != "]" or count:
                start = window.byte
                window.skip_value()
                yield start, window.byte
                count += 1
                following = window.peek_behind_space()
                if following == "]":
                    break
                if following != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", "", 0)
                window.advance(1)
            window.advance(1)
            if window.peek_behind_space():
                raise json.JSONDecodeError("Extra data after the array", "", 0)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}.") from error
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(
                f"{path} is not valid JSON after {count} records (byte {window.byte}): {reason}."
            ) from error


class _Window:
    """The text of a UTF-8 file from a cursor on, read in pieces.

    Attributes:
        byte: Where the cursor is in the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.byte = 0
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._json = json.JSONDecoder()
        self._text = ""
        self._cursor = 0
        self._ended = False

    def advance(self, characters: int) -> None:
        passed = self._text[self._cursor : self._cursor + characters]
        self.byte += len(passed.encode())
        self._cursor += characters

    def peek(self) -> str:
        """The character at the cursor; empty at the end of the file."""
        while self._cursor == len(self._text) and not self._ended:
            self._read_on()
        return self._text[self._cursor : self._cursor + 1]

    def peek_behind_space(self) -> str:
        """The next character that is not white space, with the cursor moved there."""
        while self.peek():
            space = _SPACE.match(self._text, self._cursor)
            assert space is not None
            self.advance(space.end() - self._cursor)
            if self._cursor < len(self._text):
                break
        return self.peek()

    def skip_value(self) -> None:
        """Move the cursor behind the JSON value that begins there.

        Raises:
            JSONDecodeError: There is none.
        """
        while True:
            try:
                end = self._json.raw_decode(self._text, self._cursor)[1]
                if end < len(self._text) or self._ended:  # else a number could go on
                    self.advance(end - self._cursor)
                    return
            except json.JSONDecodeError:
                if self._ended or len(self._text) - self._cursor > _LONGEST_RECORD:
                    raise
            self._read_on()

    def _read_on(self) -> None:
        """Drop what is behind the cursor and append more than is left: few retries per value."""
        left = self._text[self._cursor :]
        piece = self._file.read(max(_CHUNK, len(left)))
        self._ended = not piece
        self._text = left + self._decode(piece, final=self._ended)
        self._cursor = 0
