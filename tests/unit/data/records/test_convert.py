"""JSON arrays to JSON lines: the same records, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

from moiie_megatron.data.records.convert import array_to_lines
from moiie_megatron.data.records.llava import RecordFile
from tests.helpers.user_errors import user_error

TURNS = [{"from": "human", "value": "a\n\u732b"}, {"from": "gpt", "value": "b"}]
VALUES = [
    {"id": 1, "conversations": TURNS, "more": {"kept": [1.5, None]}},
    {"id": "half \ud83d a pair", "conversations": TURNS},
    {"not": "a record"},
]


def test_the_same_records(tmp_path: Path) -> None:
    source, out = tmp_path / "a.json", tmp_path / "b.jsonl"
    source.write_text(json.dumps(VALUES, indent=2))
    steps: list[tuple[int, int]] = []
    assert array_to_lines(source, out, lambda *step: steps.append(step)) == 3
    assert [json.loads(line) for line in out.read_text().splitlines()] == VALUES
    assert steps == [(3, 3)]
    assert [RecordFile(out)[i] for i in range(2)] == [RecordFile(source)[i] for i in range(2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.jsonl"]


def test_nothing_half_written(tmp_path: Path) -> None:
    source, out = tmp_path / "a.json", tmp_path / "b.jsonl"
    source.write_text(json.dumps(VALUES)[:-5])
    with user_error(source, "after 2 records"):
        array_to_lines(source, out)
    assert not out.exists()
    source.write_text(json.dumps(VALUES))
    out.write_text("mine")
    with user_error(out, "exists", "--out"):
        array_to_lines(source, out)
    assert out.read_text() == "mine"
    with user_error("--out", tmp_path / "b.json", ".jsonl"):
        array_to_lines(source, tmp_path / "b.json")
    with user_error(out, ".json"):
        array_to_lines(out, tmp_path / "c.jsonl")
    with user_error(tmp_path / "none" / "c.jsonl", "No such file"):
        array_to_lines(source, tmp_path / "none" / "c.jsonl")
