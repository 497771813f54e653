"""LLaVA records: conversations about images, read one at a time from a ``.json`` or ``.jsonl``.

Format: https://github.com/haotian-liu/LLaVA (docs/Finetune_Custom_Data.md).  Only the byte
range of each record is held in memory, so a file of 665k records costs about 10 MB per process
where ``json.load`` would keep more than 1 GB.
"""

from __future__ import annotations

import json
import mmap
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

PLACEHOLDER: Final = "<image>"  # where an image stands in the text of a record

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_SPACE = " \t\r\n"


class BadRecord(ValueError):
    """One sample that cannot be used; the run goes on with another one (``data/faults.py``).

    Args:
        reason: What is wrong, with the offending values.
        file: Record file, filled in by whoever knows it.
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
    """One utterance; ``<image>`` in the text stands for the next image of the record."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """A conversation and the images (paths below the image folder) in order of appearance."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


class RecordFile:
    """Random access to the records of one file: ``len(file)`` and ``file[i] -> Record``.

    Picklable: a worker process re-opens the file and reuses the index.

    Args:
        path: A JSON array (``.json``) or one JSON object per line (``.jsonl``; blank lines are
            skipped and do not count).

    Raises:
        ValueError: The file cannot be read, has another suffix, is not a JSON array, or is empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{self.path} is not a record file: use a .json array or a .jsonl.")
        try:
            index = _index_array if self.path.suffix == ".json" else _index_lines
            self._starts, self._ends = index(self.path)
        except OSError as error:
            raise ValueError(f"Cannot read {self.path}: {error.strerror or error}.") from error
        if not len(self._starts):
            raise ValueError(f"{self.path} holds no records: remove it from data.sources.")
        self._bytes: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Record:
        """The record number ``i`` (from 0).

        Raises:
            BadRecord: This record is malformed; names the file and ``i``.
            IndexError: There is no record ``i``.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, no record {i}")
        if self._bytes is None:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            value = json.loads(self._bytes[self._starts[i] : self._ends[i]])
            return parse_record(value, default_id=str(i))
        except BadRecord as error:
            raise BadRecord(error.reason, str(self.path), i) from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not valid JSON ({error})", str(self.path), i) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}


def parse_record(value: Any, default_id: str = "") -> Record:
    """A ``Record`` from the parsed JSON object of a LLaVA record.

    Raises:
        BadRecord: Not an object, no conversation, speakers that do not alternate, or another
            number of ``<image>`` placeholders than of images.
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
    return Record(str(value.get("id", default_id)), images, tuple(turns))


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
        turns.append(Turn(_ROLES[speaker], text))
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
    return tuple(paths)


def _index_lines(path: Path) -> tuple[array[int], array[int]]:
    """Byte ranges of the lines that are not blank."""
    starts, ends = array("Q"), array("Q")
    position = 0
    with path.open("rb") as file:
        for line in file:
            skipped = len(_BYTE_ORDER_MARK) if line.startswith(_BYTE_ORDER_MARK) else 0
            if line[skipped:].strip():
                starts.append(position + skipped)
                ends.append(position + len(line))
            position += len(line)
    return starts, ends


def _index_array(path: Path) -> tuple[array[int], array[int]]:
    """Byte ranges of the elements of a JSON array; the parsed elements are thrown away."""
    raw = path.read_bytes()
    position = len(_BYTE_ORDER_MARK) if raw.startswith(_BYTE_ORDER_MARK) else 0
    try:
        text = raw[position:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error
    del raw
    starts, ends = array("Q"), array("Q")
    cursor = _skip_space(text, 0)
    if text[cursor : cursor + 1] != "[":
        raise ValueError(f"{path} is not a JSON array: one object per line belongs in a .jsonl.")
    decoder = json.JSONDecoder()
    cursor = _skip_space(text, cursor + 1)
    counted = 0  # characters whose bytes are already in position
    try:
        while text[cursor : cursor + 1] != "]" or starts:
            end = decoder.raw_decode(text, cursor)[1]
            position += len(text[counted:cursor].encode())
            starts.append(position)
            position += len(text[cursor:end].encode())
            ends.append(position)
            counted = end
            cursor = _skip_space(text, end)
            if text[cursor : cursor + 1] == "]":
                break
            if text[cursor : cursor + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, cursor)
            cursor = _skip_space(text, cursor + 1)
        if text[cursor + 1 :].strip(_JSON_SPACE):
            raise json.JSONDecodeError("Extra data after the array", text, cursor + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON after {len(starts)} records: {error}."
        ) from error
    return starts, ends


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _JSON_SPACE:
        position += 1
    return position
