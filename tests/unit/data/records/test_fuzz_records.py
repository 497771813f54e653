"""Hundreds of damaged record files, seeded: records or one sentence, in bounded time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.records.record import Record
from moiie_megatron.utils.errors import UserError
from tests.helpers.fuzz import damaged, time_limit

ROUNDS = 400  # for every suffix
TURNS = [
    {"from": "human", "value": "<image>\nwas ist \u00fcber \U0001f600?"},
    {"from": "gpt", "value": "7"},
]
RECORDS = [
    {"id": "a", "image": "a.png", "conversations": TURNS},
    {"id": 7, "image": ["a.png", "b.png"], "conversations": TURNS * 2},
    {
        "conversations": [{"from": "system", "value": "x"}, *TURNS],
        "image": "c.png",
        "score": -1.5e-3,
    },
]
TEXTS = {
    ".json": json.dumps(RECORDS, indent=1, ensure_ascii=False),
    ".jsonl": "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n",
}


def record(fields: str) -> str:
    return f'[{{{fields}, "conversations": {json.dumps(TURNS)}}}]'


HOSTILE = [
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 100_000 + "]" * 100_000,
    "[" * 5001 + "]" * 5001,
    record('"id": ' + "9" * 10_000),
    record('"id": 1e999'),
    "[NaN, Infinity, -Infinity, null, true, 3, [], {}]",
    record('"id": NaN, "image": Infinity'),
    record('"id": 1, "id": {}, "image": "a", "image": "b", "conversations": 3'),
    record('"image": "\\ud800.png"'),
    '[{"id": "\\udfff", "conversations": [{"from": "human", "value": "\\ud83d"}]}]',
    record('"id": "a\\u0000b", "image": "\\u0000"'),
    '[{"conversations": {"from": "human"}}]',
    '[{"conversations": [{"from": ["human"], "value": {}}]}]',
    record('"image": {"path": "a.png"}'),
    record('"image": [["a.png"]]'),
    "",
    " \n\t ",
    "[",
    "[]",
    "[,]",
    "{}",
    '"text"',
    "\0" * 5000,
]


def read_all(path: Path) -> None:
    """Every record, as the tools read them; what is wrong with one is a sentence, too."""
    with time_limit(5):
        try:
            file = RecordFile(path)
        except UserError as error:
            check(error)
            return
        for i in range(len(file)):
            try:
                assert isinstance(file[i], Record)
            except UserError as error:
                check(error)


def check(error: UserError) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 1000 and "Traceback" not in text


@pytest.mark.parametrize("suffix", TEXTS)
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    draw = random.Random(suffix)
    path = tmp_path / f"records{suffix}"
    for _ in range(ROUNDS):
        path.write_bytes(damaged(TEXTS[suffix].encode(), draw))
        read_all(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_encodings(suffix: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"records{suffix}"
    path.write_bytes(TEXTS[suffix].encode(encoding, errors="replace"))
    read_all(path)
    if encoding.startswith("utf-8"):
        assert [record.images for record in RecordFile(path)] == [
            ("a.png",), ("a.png", "b.png"), ("c.png",)
        ]  # fmt: skip


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_files(suffix: str, number: int, tmp_path: Path) -> None:
    path = tmp_path / f"records{suffix}"
    text = HOSTILE[number]
    path.write_text(text if suffix == ".json" else text.removeprefix("[").removesuffix("]"))
    read_all(path)
    assert list(tmp_path.iterdir()) == [path]
