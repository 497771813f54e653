"""Logs that are cut off, damaged or of other programs: one sentence with the file and the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiie_megatron.analysis.records import read_metrics
from moiie_megatron.analysis.scores import read_scores
from moiie_megatron.analysis.validations import read_validations
from moiie_megatron.routing_stats.reading import read_routing
from moiie_megatron.training.validation.result import GroupSums, Validation
from tests.helpers.user_errors import user_error
from tests.unit.routing_stats.routing_records import RECORDS

GOOD = b'{"step": 1, "lm_loss": NaN}\n'


@pytest.mark.parametrize(
    ("second", "part"),
    [
        (b'{"ste\n', "not JSON"),
        (b"\xff\xfe\x00\n", "not JSON"),
        (b"[1]\n", "no JSON object"),
        (b"[" * 5000 + b"\n", "not JSON"),
        (b'{"lm_loss": 1.0}\n', "no step"),
        (b'{"step": 2}\n', "no lm_loss"),
        (b'{"step": NaN, "lm_loss": 1.0}\n', "nan as step"),
        (b'{"step": 2, "lm_loss": "x"}\n', "'x' as lm_loss"),
        (b'{"step": 2, "lm_loss": 1.0, "seconds": NaN}\n', "nan as seconds"),
    ],
)
def test_a_foreign_line(tmp_path: Path, second: bytes, part: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(GOOD + second)
    with user_error(file, "line 2", part):
        read_metrics(file, ["lm_loss"])


def test_a_last_line_without_its_end_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(GOOD + b'{"step": 2, "lm_l\xff')
    assert len(read_metrics(file, ["lm_loss"])) == 1


@pytest.mark.parametrize("key", ["experts", "layers", "top_k", "moved", "steps"])
def test_a_foreign_routing_record(tmp_path: Path, key: str) -> None:
    file = tmp_path / "routing.jsonl"
    for value in ("x", None, -1):
        lines = [RECORDS[0], RECORDS[1] | {key: value}]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with user_error(file, "line 2", key):
            read_routing(file)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"step": -1}, "step"),
        ({"loss": "x"}, "loss"),
        ({"sources": []}, "sources"),
        ({"image_counts": {"text_only": {"loss": 1.0}}}, "image_counts.text_only.samples"),
    ],
)
def test_a_foreign_validation(tmp_path: Path, changes: dict[str, object], part: str) -> None:
    good = Validation({"a": [GroupSums(), GroupSums(3.0, 1, 2, 9, 4), GroupSums()]}).to_json() | {
        "step": 1
    }
    lines = [good, good | {"step": 2} | changes]
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with user_error(file, "line 2", part):
        read_validations(tmp_path)
    file.write_text(json.dumps(good) + "\n" + '{"step": 2, "lo')
    assert read_validations(tmp_path).curves == [{"step": 1, "all samples": 1.5}]


def test_foreign_scores(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    for text in ("", "[]", "[" * 5000, '{"questions": 1}', '{"questions": 1, "accuracy": NaN}'):
        file.write_text(text)
        with user_error(file, "tools/accuracy.py"):
            read_scores(file)
