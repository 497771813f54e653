"""The digits data set: right answers, disjoint scans, the same bytes every time."""

from __future__ import annotations

import filecmp
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from sklearn.datasets import load_digits

from moiie_megatron.data.digits import questions as ask
from moiie_megatron.data.digits.dataset import write_digits
from moiie_megatron.data.records.llava import RecordFile
from tests.helpers.user_errors import user_error

PLACES = ["top left", "top right", "bottom left", "bottom right"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "d", train=240, test=80)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def expected_answer(question: str, labels: list[int]) -> str:
    """An oracle that reads the question; labels are of one grid, or of two."""
    question = question.replace("<image>\n", "")
    for place, name in enumerate(PLACES):
        if question == f"Which digit is at the {name}?":
            return str(labels[place])
        if question == f"Is there the same digit at the {name} of both pictures?":
            return "yes" if labels[place] == labels[4 + place] else "no"
        for digit, word in enumerate(WORDS):
            if question == f"Is the digit at the {name} a {word}?":
                return "yes" if labels[place] == digit else "no"
    row = {"What is the sum of the top row?": 0, "What is the sum of the bottom row?": 2}[question]
    return str(labels[row] + labels[row + 1])


def exchanges(record: dict[str, Any]) -> list[tuple[str, str]]:
    texts = [turn["value"] for turn in record["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_answers_are_true(folder: Path, name: str) -> None:
    target = load_digits().target
    checked = 0
    for record in lines(folder / name):
        if "image" not in record:
            continue
        labels = [int(target[scan]) for scan in record["_scans"]]
        for question, answer in exchanges(record):
            assert answer == expected_answer(question, labels), record
            checked += 1
    assert checked > 150


def test_text_answers_are_true(folder: Path) -> None:
    records = lines(folder / "text.jsonl")
    records += [r for r in lines(folder / "train.jsonl") if "image" not in r]
    kinds: Counter[str] = Counter()
    for record in records:
        ((question, answer),) = exchanges(record)
        if question.startswith("What is ") and " the " not in question:
            a, operation, b = question.removeprefix("What is ").rstrip("?").split()
            assert int(answer) == (int(a) + int(b) if operation == "plus" else int(a) - int(b))
            kinds["arithmetic"] += 1
        else:
            described, asked = question.split(". ")
            digits = dict(part.rsplit(" ", 1) for part in described.split(", "))
            labels = [int(digits[place]) for place in PLACES]
            assert answer == expected_answer(asked, labels)
            kinds["described"] += 1
    assert kinds["arithmetic"] > 50 and kinds["described"] > 150


def test_pictures_show_the_scans(folder: Path) -> None:
    scans = load_digits().images
    record = lines(folder / "test.jsonl")[0]
    with Image.open(folder / "images" / record["image"]) as image:
        assert image.size == (28, 28)
        picture = np.asarray(image, dtype=float)
    for place, scan in enumerate(record["_scans"]):
        row, column = divmod(place, 2)
        tile = picture[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
        enlarged = scans[scan].repeat(7, 0).repeat(7, 1)[::4, ::4]  # 8 -> 56 -> 14
        assert np.corrcoef(tile.ravel(), enlarged.ravel())[0, 1] > 0.85


def test_captions(folder: Path) -> None:
    target = load_digits().target
    captions = json.loads((folder / "captions.json").read_text())
    assert len(captions) == 240
    firsts = set()
    for record in captions:
        ((_, answer),) = exchanges(record)
        parts = [f"{p} {target[s]}" for p, s in zip(PLACES, record["_scans"], strict=True)]
        assert sorted(answer.split(", ")) == sorted(parts)
        firsts.add(answer[: len("bottom r")])
    assert len(firsts) == 4  # in any order


def test_no_scan_is_in_both_splits(folder: Path) -> None:
    train = {s for r in lines(folder / "train.jsonl") for s in r.get("_scans", [])}
    train |= {s for r in json.loads((folder / "captions.json").read_text()) for s in r["_scans"]}
    test = {s for r in lines(folder / "test.jsonl") for s in r["_scans"]}
    assert len(train) > 500 and len(test) > 150 and not train & test


def test_yes_and_no_are_balanced() -> None:
    rng = random.Random(1)
    answers: Counter[str] = Counter()
    for _ in range(2000):
        grid = tuple(rng.randrange(10) for _ in range(4))
        answers[ask.is_digit(grid, rng).answer] += 1
    assert 900 < answers["yes"] < 1100


def test_every_record_can_be_read(folder: Path) -> None:
    counts = json.loads((folder / "manifest.json").read_text())["records"]
    for name in ("captions.json", "train.jsonl", "test.jsonl", "text.jsonl"):
        file = RecordFile(folder / name)
        records = [file[i] for i in range(len(file))]
        assert len(records) == counts[name.split(".")[0]]
        assert len({record.id for record in records}) == len(records)
        assert all((folder / "images" / path).is_file() for r in records for path in r.images)
    train = [RecordFile(folder / "train.jsonl")[i] for i in range(counts["train"])]
    shapes = {(len(record.images), len(record.turns) > 2) for record in train}
    assert shapes == {(0, False), (1, False), (1, True), (2, False)}


def test_tokenizer_covers_the_texts(folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert processor.get_piece_size() <= 256
    assert (
        processor.get_piece_size()
        == json.loads((folder / "manifest.json").read_text())["vocab_size"]
    )
    special = [
        processor.piece_to_id(p) for p in ("<|user|>", "<|assistant|>", "<|end|>", "<image>")
    ]
    assert len(set(special)) == 4 and processor.unk_id() not in special
    for record in lines(folder / "train.jsonl"):
        for question, answer in exchanges(record):
            for text in (question, answer):
                ids = processor.encode(text)
                assert processor.unk_id() not in ids and processor.decode(ids) == text
    assert len(processor.encode("17")) == 2  # digit by digit


def test_the_same_settings_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_digits(tmp_path / "d", train=240, test=80)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    _, different, errors = filecmp.cmpfiles(folder, again, files, shallow=False)
    assert (different, errors) == ([], [])
    before = (again / "manifest.json").stat().st_mtime_ns
    assert write_digits(again, train=240, test=80) == again
    assert (again / "manifest.json").stat().st_mtime_ns == before  # kept, not written again


def test_other_content_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    with user_error(folder, "'seed': 0", "'seed': 1"):
        write_digits(folder, seed=1, train=240, test=80)
    (tmp_path / "note.txt").write_text("mine")
    with user_error(tmp_path, "digits"):
        write_digits(tmp_path, train=4, test=2)
    with user_error("image_size=27"):
        write_digits(tmp_path / "x", image_size=27)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("moiie_megatron.data.digits.dataset.train_tokenizer", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_digits(tmp_path / "d", train=4, test=2)
    assert list(tmp_path.iterdir()) == []
