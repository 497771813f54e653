"""Byte ranges of the records of a file, found in one pass and cached beside large files.

A pass over a million records takes seconds to minutes, and every process of a run needs the
ranges.  So those of a large file are written to ``NAME.ranges.npy`` beside it: the first process of
a node finds them, and all processes map the same pages of memory.  If the directory is read-only,
every process scans the file itself.

LLaVA's files are JSON arrays and are read where they are, without a converted copy.  The scanner
is our own because JSON libraries report no byte offsets of the elements (ijson yields values only).
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

CACHED_FROM: Final = 16 << 20  # bytes; smaller files are scanned in a fraction of a second
CHUNK: Final = 4 << 20  # bytes read at a time
LONGEST_RECORD: Final = (
    64 << 20
)  # characters; what is longer is taken for a missing bracket or quote
_BYTE_ORDER_MARK = "\ufeff"
_SPACE = re.compile(r"[ \t\r\n]*")


def record_ranges(path: Path, cached_from: int = CACHED_FROM) -> np.ndarray:
    """The byte ranges of all records of a file.

    Args:
        path: A ``.json`` file is an array, any other has one record per line that is not blank.
        cached_from: Size in bytes from which the ranges are cached beside the file.

    Returns:
        int64 (r, 2): the first byte of every record, and the byte after its last.

    Raises:
        OSError: The file cannot be read.
        UserError: It is not a JSON array of UTF-8 text.
    """
    if path.stat().st_size < cached_from:
        return _scan(path)
    with _locked(path):
        version = _version(
            path
        )  # before the scan: if the file changes meanwhile, the cache is stale
        cached = open_ranges(path)
        if cached is None:
            found = _scan(path)
            _write_cache(path, version, found)
            cached = open_ranges(path)
        return found if cached is None else cached


def ranges_file(path: Path) -> Path:
    """Where the ranges of a record file are cached."""
    return path.with_name(path.name + ".ranges.npy")


def open_ranges(path: Path) -> np.ndarray | None:
    """The cached ranges of a record file, mapped into memory; None if missing or stale."""
    try:
        table = np.load(ranges_file(path), mmap_mode="r")
    except (OSError, ValueError, EOFError):  # missing, or not written by this program
        return None
    fits = table.dtype == np.int64 and table.ndim == 2 and table.shape[1] == 2 and len(table)
    return table[1:] if fits and tuple(table[0]) == _version(path) else None


def _scan(path: Path) -> np.ndarray:
    flat = array("q")
    for start, end in _array_ranges(path) if path.suffix == ".json" else _line_ranges(path):
        flat.append(start)
        flat.append(end)
    return (
        np.frombuffer(flat, dtype=np.int64).reshape(-1, 2) if flat else np.empty((0, 2), np.int64)
    )


def _write_cache(path: Path, version: tuple[int, int], ranges: np.ndarray) -> None:
    """Write the version of the record file and the ranges, if the directory is writable."""
    final = ranges_file(path)
    # Several nodes may write at once, so each process has its own temporary file.
    beside = final.with_name(f"{final.name}.writing{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.save(file, np.concatenate([np.array([version], dtype=np.int64), ranges]))
        os.replace(beside, final)
    except OSError:
        beside.unlink(missing_ok=True)


def _version(path: Path) -> tuple[int, int]:
    """Size and modification time of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of a node at a time, if the file system supports locks."""
    with path.open("rb") as file:
        # NFS locks only files that are open for writing; there all processes scan.
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
    """Ranges of the elements of a JSON array; the parsed elements are discarded."""
    with path.open("rb") as file:
        window = _Window(file)
        count = 0
        try:
            if window.peek() == _BYTE_ORDER_MARK:
                window.advance(1)
            if window.peek_after_space() != "[":
                raise UserError(
                    f"{path} is not a JSON array: rename a file with one object per line to .jsonl."
                )
            window.advance(1)
            while window.peek_after_space() != "]" or count:
                start = window.byte
                window.skip_value()
                yield start, window.byte
                count += 1
                following = window.peek_after_space()
                if following == "]":
                    break
                if following != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", "", 0)
                window.advance(1)
            window.advance(1)
            if window.peek_after_space():
                raise json.JSONDecodeError("Extra data after the array", "", 0)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}): convert it to UTF-8.") from error
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(
                f"{path} is not valid JSON after {count} records (byte {window.byte}, {reason}): "
                "repair it there."
            ) from error


class _Window:
    """A cursor in the text of a UTF-8 file that is read in pieces.

    Attributes:
        byte: Byte offset of the cursor in the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.byte = 0
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        # Only the end of a value counts, and Python refuses to convert a number of 4300 digits.
        self._json = json.JSONDecoder(parse_int=str, parse_float=str)
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
            self._read_more()
        return self._text[self._cursor : self._cursor + 1]

    def peek_after_space(self) -> str:
        """Move the cursor to the next character that is not white space; returns it."""
        while self.peek():
            space = _SPACE.match(self._text, self._cursor)
            assert space is not None
            self.advance(space.end() - self._cursor)
            if self._cursor < len(self._text):
                break
        return self.peek()

    def skip_value(self) -> None:
        """Move the cursor past the JSON value that starts there.

        Raises:
            JSONDecodeError: No value starts there.
        """
        while True:
            try:
                end = self._json.raw_decode(self._text, self._cursor)[1]
                if end < len(self._text) or self._ended:  # else a number may continue
                    self.advance(end - self._cursor)
                    return
            except json.JSONDecodeError:
                if self._ended or len(self._text) - self._cursor > LONGEST_RECORD:
                    raise
            self._read_more()

    def _read_more(self) -> None:
        """Drop the text before the cursor and at least double the rest: few retries per value."""
        left = self._text[self._cursor :]
        piece = self._file.read(max(CHUNK, len(left)))
        self._ended = not piece
        self._text = left + self._decode(piece, final=self._ended)
        self._cursor = 0
