"""Files of LLaVA records, read one record at a time from ``.json`` or ``.jsonl``.

Format: https://github.com/haotian-liu/LLaVA (docs/Finetune_Custom_Data.md).  Memory holds only the
byte range of each record (``data/records/index.py``): 16 bytes, shared by the processes of a node
for large files.  ``json.load`` of 665k records would keep more than 1 GB in every process.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from moiie_megatron.data.records.index import open_ranges, record_ranges
from moiie_megatron.data.records.parse import parse_record
from moiie_megatron.data.records.record import BadRecord, Record
from moiie_megatron.utils.errors import UserError


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
        if self.path.exists() and not self.path.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{self.path} is no regular file: write the records to a file first.")
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
