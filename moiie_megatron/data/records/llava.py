"""LLaVA records: conversations about images, read one at a time from ``.json`` or ``.jsonl``.

Format: https://github.com/haotian-liu/LLaVA (docs/Finetune_Custom_Data.md).  Memory holds only the
byte range of each record (``data/records/index.py``): 16 bytes, shared by the processes of a node
for large files.  ``json.load`` of 665k records would keep more than 1 GB in every process.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from moiie_megatron.data.records.index import open_ranges, record_ranges
from moiie_megatron.utils.errors import UserError

PLACEHOLDER: Final = "<image>"  # marks the position of an image in the text of a record

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}


class BadRecord(UserError):
    """A record that cannot be used; the run skips it (``data/stream/skipped_samples.py``).

    Args:
        reason: What is wrong, with the offending values.
        file: Record file, filled in by the caller that knows it.
        index: Record number in that file, from 0.
    """

    def __init__(self, reason: str, file: str = "", index: int = -1) -> None:
        super().__init__(reason, file, index)
        self.reason = reason
        self.file = file
        self.index = index

    def __str__(self) -> str:
        return f"{self.file}[{self.index}]: {self.reason}" if self.file else self.reason


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; ``<image>`` in its text is the next image of the record."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """A conversation and its images, as paths below the image directory, in order of appearance."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


class RecordFile:
    """Random access to the records of one file: ``len(file)`` and ``file[i] -> Record``.

    Picklable: a worker process reopens the file and reuses the byte ranges.

    Args:
        path: A JSON array (``.json``) or one JSON object per line (``.jsonl``; blank lines are
            not counted).

    Raises:
        UserError: The file cannot be read, has another suffix, is not a JSON array, or is empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".json", ".jsonl"):
            raise UserError(f"{self.path} is not a record file: use a .json array or a .jsonl.")
        try:
            self._ranges = record_ranges(self.path)
        except OSError as error:
            raise UserError(
                f"Cannot read {self.path} ({error.strerror or error}): correct the path."
            ) from error
        if not len(self._ranges):
            raise UserError(f"{self.path} holds no records: remove it from data.sources.")
        self._bytes: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, i: int) -> Record:
        """Record number ``i``, from 0.

        Raises:
            BadRecord: The record is malformed; names the file and ``i``.
            IndexError: There is no record ``i``.
        """
        value = self.value(i)
        try:
            return parse_record(value, default_id=str(i))
        except BadRecord as error:
            raise BadRecord(error.reason, str(self.path), i) from error

    def value(self, i: int) -> Any:
        """The parsed JSON value of record ``i``, well-formed as a record or not.

        Raises:
            BadRecord: It is not JSON; names the file and ``i``.
            IndexError: There is no record ``i``.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, no record {i}")
        if self._bytes is None:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, end = self._ranges[i].tolist()
        try:
            return json.loads(self._bytes[start:end])
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not valid JSON ({error})", str(self.path), i) from error

    def __getstate__(self) -> dict[str, Any]:
        mapped = isinstance(self._ranges, np.memmap)
        return {**self.__dict__, "_bytes": None, "_ranges": None if mapped else self._ranges}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._ranges is None:
            cached = open_ranges(self.path)
            self._ranges = record_ranges(self.path) if cached is None else cached


def parse_record(value: Any, default_id: str = "") -> Record:
    """The ``Record`` of a parsed LLaVA record.

    Images without placeholders are put in front of the first human turn.

    Args:
        value: The parsed JSON value.
        default_id: Used if the record has no ``id``.

    Raises:
        BadRecord: Not an object, no conversation, speakers that do not alternate, or the numbers
            of ``<image>`` placeholders and images differ.
    """
    if not isinstance(value, dict):
        raise BadRecord(f"a record must be a JSON object, not {type(value).__name__}")
    turns = _parse_turns(value.get("conversations"))
    images = _parse_images(value.get("image"))
    placeholders = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if images and not placeholders:
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        text = f"{PLACEHOLDER}\n" * len(images) + turns[first].text
        turns[first] = replace(turns[first], text=text)
    elif placeholders != len(images):
        raise BadRecord(f"{placeholders} {PLACEHOLDER} placeholders but {len(images)} images")
    # JSON can express a lone surrogate, which could not be printed.
    name = str(value.get("id", default_id)).encode(errors="backslashreplace").decode()
    return Record(name, images, tuple(turns))


def _parse_turns(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise BadRecord("conversations must be a list with at least one turn")
    turns: list[Turn] = []
    for i, item in enumerate(value):
        speaker, text = (
            (item.get("from"), item.get("value")) if isinstance(item, dict) else (None, None)
        )
        if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(text, str):
            raise BadRecord(
                f"turn {i} must have from (human, gpt or a leading system) and value (text), "
                f"not {str(item)[:80]}"
            )
        turns.append(Turn(_ROLES[speaker], _checked_unicode(text, f"turn {i}")))
    spoken = turns[1:] if turns[0].role == "system" else turns
    for i, turn in enumerate(spoken):
        expected: Role = "assistant" if i % 2 else "user"
        if turn.role != expected:
            raise BadRecord(f"turns must alternate human, gpt: turn {i} is by the {turn.role}")
    if not spoken:
        raise BadRecord("the conversation has no human turn")
    return turns


def _parse_images(value: Any) -> tuple[str, ...]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
        raise BadRecord(f"image must be a path or a list of paths, not {str(value)[:80]}")
    return tuple(_checked_unicode(path, "image") for path in paths)


def _checked_unicode(text: str, where: str) -> str:
    """``text``, refused if it has a lone surrogate, which tokenizers and file systems refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise BadRecord(f"{where} has a lone surrogate ({escape})") from error
    return text
