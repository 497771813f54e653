"""Records: both file forms give the same, and every malformed record is named."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.records.parse import parse_record
from moiie_megatron.data.records.record import BadRecord, Turn
from tests.helpers.user_errors import user_error

HUMAN = {"from": "human", "value": "what?"}
GPT = {"from": "gpt", "value": "a caf\u00e9 \u732b"}
GOOD: list[dict[str, Any]] = [
    {"id": 5, "image": "a.png", "conversations": [HUMAN, GPT]},
    {"conversations": [{"from": "system", "value": "be kind"}, HUMAN, GPT]},
    {"id": "x", "image": ["a.png", "b.png"], "conversations": [HUMAN, GPT, HUMAN, GPT]},
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_both_forms_give_the_same_records(tmp_path: Path, ascii_only: bool, mark: bytes) -> None:
    lines = [json.dumps(r, ensure_ascii=ascii_only).encode() for r in GOOD]
    (tmp_path / "a.jsonl").write_bytes(mark + b"\n  \n" + b"\r\n\n".join(lines))
    array = json.dumps(GOOD, ensure_ascii=ascii_only, indent=2).encode()
    (tmp_path / "a.json").write_bytes(mark + array + b"\n")
    for name in ("a.jsonl", "a.json"):
        file = RecordFile(tmp_path / name)
        records = [file[i] for i in range(len(file))]
        assert [r.id for r in records] == ["5", "1", "x"]
        assert [r.images for r in records] == [("a.png",), (), ("a.png", "b.png")]
        assert records[0].turns == (
            Turn("user", "<image>\nwhat?"),
            Turn("assistant", "a caf\u00e9 \u732b"),
        )
        assert records[1].turns[0] == Turn("system", "be kind")
        assert records[2].turns[0].text == "<image>\n<image>\nwhat?"
        assert records[2].turns[2].text == "what?"
        with pytest.raises(IndexError):
            file[3]
        again = pickle.loads(pickle.dumps(file))
        assert [again[i] for i in range(len(again))] == records


def test_placeholders_stay_where_they_are() -> None:
    turns = [{"from": "human", "value": "a <image> b <image>"}, GPT]
    record = parse_record({"image": ["1", "2"], "conversations": turns})
    assert record.turns[0].text == "a <image> b <image>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (7, "JSON object"),
        ([], "conversations"),
        ({}, "conversations"),
        ({"conversations": []}, "conversations"),
        ({"conversations": [GPT]}, "turn 0 is by the assistant"),
        ({"conversations": [HUMAN, HUMAN]}, "turn 1 is by the user"),
        ({"conversations": [HUMAN, {"from": "system", "value": "x"}]}, "by the system"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "no human turn"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 0 must have"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 must have"),
        ({"conversations": ["hello"]}, "turn 0 must have"),
        ({"image": 7, "conversations": [HUMAN, GPT]}, "not 7"),
        ({"image": "", "conversations": [HUMAN, GPT]}, "image must be"),
        ({"image": "\ud83d.png", "conversations": [HUMAN, GPT]}, "image has a lone surrogate"),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": "a\udc00"}]},
            r"turn 1 has a lone surrogate \(.udc00\)",
        ),
        (
            {"image": ["a", "b"], "conversations": [{"from": "human", "value": "<image>"}, GPT]},
            "1 <image> placeholders but 2 images",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, GPT]},
            "1 <image> placeholders but 0 images",
        ),
    ],
)
def test_bad_records_are_named(tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD[0]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(BadRecord, match=message) as caught:
        RecordFile(path)[1]
    assert (caught.value.file, caught.value.index) == (str(path), 1)
    assert str(caught.value).startswith(f"{path}[1]: ")
    assert RecordFile(path)[0].id == "5"


@pytest.mark.timeout(20)
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    for path in (tmp_path / "a.jsonl", tmp_path / "b.jsonl"):
        with user_error(path, "no regular file"):
            RecordFile(path)


def test_a_broken_line_spoils_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": \n' + json.dumps(GOOD[1]).encode() + b"\n\xff\xfe{}\n")
    file = RecordFile(path)
    for i in (0, 2):
        with pytest.raises(BadRecord, match="not valid JSON"):
            file[i]
    assert len(file[1].turns) == 3
    copied = pickle.loads(pickle.dumps(BadRecord("why", "f", 3)))
    assert (copied.reason, copied.file, copied.index) == ("why", "f", 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"id": 1}', "JSON array"),
        ("a.json", "[1, 2", "after 2 records"),
        ("a.json", "[1, ]", "after 1 records"),
        ("a.json", "[1 2]", "after 1 records"),
        ("a.json", "[", "after 0 records"),
        ("a.json", "[1] x", "after 1 records"),
        ("a.json", "[]", "no records"),
        ("a.json", "", "JSON array"),
        ("a.jsonl", "\n \n", "no records"),
        ("a.csv", "1,2", ".jsonl"),
    ],
)
def test_files_that_are_no_record_files(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with user_error(tmp_path / name, message):
        RecordFile(tmp_path / name)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with user_error(tmp_path / "none.json", "No such file"):
        RecordFile(tmp_path / "none.json")
    (tmp_path / "d.jsonl").mkdir()
    with user_error(tmp_path / "d.jsonl"):
        RecordFile(tmp_path / "d.jsonl")
