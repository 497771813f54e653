from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiie_megatron.evaluation.benchmarks.outcome import Outcome
from moiie_megatron.evaluation.benchmarks.table import (
    as_json,
    markdown,
    mean,
    read_all,
    write_tables,
)


@pytest.fixture
def outcomes() -> list[Outcome]:
    return [
        Outcome("POPE", "pope", "scored", "pope_f1_score", 85.5, {}, 9000, 2, "a | b"),
        Outcome("GQA", "gqa", "scored", "exact_match", 60.0, {}, 100),
        Outcome("MM-Vet", "mmvet", "unscored", requests=218, reason="needs a judge"),
        Outcome("MME", "mme", "scored", "mme_perception_score", 1500.0, {}, 2374),
        Outcome("mine", "mine", "failed", reason="KeyError"),
    ]


def test_the_mean_is_of_what_the_paper_averages(outcomes: list[Outcome]) -> None:
    assert mean(outcomes) == (72.75, 2)
    assert mean(outcomes[2:]) == (None, 0)


def test_markdown(outcomes: list[Outcome]) -> None:
    text = markdown("/exports/a", outcomes, None)
    assert "| POPE | pope_f1_score | 85.5 | 8998 of 9000 | a / b |" in text
    assert "| MM-Vet |  | - | 218 of 218 | unscored: needs a judge |" in text
    assert "| **mean** of 2 of 14 | | **72.8** | | |" in text
    assert "| LLaMA-3-8B, 2M | 59.4 | 59.4 | 60.0 | 60.6 |" in text
    assert "not to be compared" not in text
    assert "Only the first 10 rows" in markdown("/exports/a", outcomes, 10)


def test_files(outcomes: list[Outcome], tmp_path: Path) -> None:
    for outcome in outcomes:
        (tmp_path / outcome.task).mkdir()
        outcome.write(tmp_path / outcome.task)
    found = read_all(tmp_path)
    assert [outcome.benchmark for outcome in found] == ["GQA", "MM-Vet", "POPE", "MME", "mine"]
    assert {*map(repr, found)} == {*map(repr, outcomes)}
    write_tables(tmp_path, "text", as_json({"limit": None}, "/exports/a", found))
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["mean"] == 72.75 and values["mean_of"] == 2
    assert values["benchmarks"]["MME"]["score"] == 1500.0
    assert values["paper_averages"][0]["moiie"] == 57.9
    assert (tmp_path / "results.md").read_text() == "text"
