"""Byte ranges: those of a whole-file parser, cached beside large files, and never stale."""

from __future__ import annotations

import json
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moiie_megatron.data.records import index as record_index
from moiie_megatron.data.records import llava
from moiie_megatron.data.records.index import open_ranges, ranges_file, record_ranges
from moiie_megatron.data.records.llava import RecordFile
from tests.helpers.user_errors import user_error

VALUES = [{"a": "x" * n, "b": ["\u732b", n, {"c": '"]},{'}]} for n in range(30)] + [
    7,
    12345,
    "\u00e9",
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, 10_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    """Values, characters of several bytes and numbers are cut anywhere."""
    monkeypatch.setattr(record_index, "CHUNK", chunk)
    path = tmp_path / "a.json"
    text = "\ufeff \n" + json.dumps(VALUES, ensure_ascii=False, indent=indent) + " \n"
    path.write_text(text, encoding="utf-8")
    raw = path.read_bytes()
    assert [json.loads(raw[a:b]) for a, b in record_ranges(path).tolist()] == VALUES


def test_an_endless_record_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index, "CHUNK", 8)
    monkeypatch.setattr(record_index, "LONGEST_RECORD", 100)
    path = tmp_path / "a.json"
    path.write_text('[1, "' + "x" * 100_000)
    with user_error(path, "after 1 records (byte 4, Unterminated string"):
        record_ranges(path)
    path.write_bytes(b'[1, "\xff"]')
    with user_error(path, "UTF-8"):
        record_ranges(path)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    records = [{"id": str(i), "conversations": turns} for i in range(5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_cached_beside_large_files_only(lines: Path) -> None:
    found = record_ranges(lines)
    assert list(lines.parent.iterdir()) == [lines] and not isinstance(found, np.memmap)
    cached = record_ranges(lines, cached_from=1)
    assert isinstance(cached, np.memmap) and cached.tolist() == found.tolist()
    assert sorted(lines.parent.iterdir()) == [lines, ranges_file(lines)]


def test_cached_ranges_are_used(lines: Path) -> None:
    """A cache with other content than the file shows that the file is not scanned again."""
    record_ranges(lines, cached_from=1)
    table = np.load(ranges_file(lines))
    np.save(ranges_file(lines), table[:3])
    assert record_ranges(lines, cached_from=1).tolist() == table[1:3].tolist()


def test_a_changed_file_is_scanned_again(lines: Path) -> None:
    assert len(record_ranges(lines, cached_from=1)) == 5
    content = lines.read_bytes()
    lines.write_bytes(content + content)
    assert open_ranges(lines) is None
    assert len(record_ranges(lines, cached_from=1)) == 10
    status = lines.stat()
    os.utime(lines, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_ranges(lines) is None
    ranges_file(lines).write_bytes(b"\x93NUMPY torn")
    assert len(record_ranges(lines, cached_from=1)) == 10


def test_without_a_place_for_the_cache(lines: Path) -> None:
    ranges_file(lines).mkdir()  # nothing can be written there
    found = record_ranges(lines, cached_from=1)
    assert len(found) == 5 and not isinstance(found, np.memmap)
    assert sorted(lines.parent.iterdir()) == [lines, ranges_file(lines)]


def test_workers_map_the_file_too(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "record_ranges", partial(record_ranges, cached_from=1))
    file = RecordFile(lines)
    pickled = pickle.dumps(file)
    assert b"\x93NUMPY" not in pickled and len(pickled) < 1000
    again = pickle.loads(pickled)
    assert [again[i].id for i in range(5)] == ["0", "1", "2", "3", "4"]
