"""What tools/evaluate.py refuses before it starts anything; tests/lmms_eval runs it in earnest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import command, run
from tests.helpers.user_errors import assert_user_error
from tests.unit.evaluation.benchmarks.stand_in import write_python

EVALUATE = "tools/evaluate.py"
FOUND = {"version": "0.7.3", "tasks": ["pope", "realworldqa"], "problem": ""}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Says of itself that it has lmms-eval."""
    return write_python(tmp_path, f"print({json.dumps(FOUND)!r})")


def test_the_catalogue_is_printed() -> None:
    finished = run(command(EVALUATE, ["--list"]), timeout=60).check()
    assert len(finished.stdout.splitlines()) == 21
    assert "docvqa_val" in finished.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["EXPORT", "--out", "OUT", "--limit", 0], ["--limit", 0]),
        (["EXPORT"], ["--out"]),
        (["EXPORT", "--out", "OUT", "--data", "none"], ["--data", "none"]),
        (["EXPORT", "--out", "OUT", "--tasks", "popee"], ["popee", "pope"]),
        (["EXPORT", "--out", "OUT"], ["EXPORT", "tools/convert.py export"]),
        (["EXPORT", "--out", "OUT", "--model", "a"], ["--model", "EXPORT"]),
        (["http://127.0.0.1:9/v1", "--out", "OUT"], ["http://127.0.0.1:9/v1"]),
        (["http://a/v1", "--out", "OUT", "--expert", "vision"], ["--expert", "http://a/v1"]),
        (["EXPORT", "--out", "OUT", "--routing", "--expert", "vision"], ["--routing", "vision"]),
    ],
)
def test_mistakes_are_named(python: Path, words: list[Any], parts: list[Any]) -> None:
    out = python.parent / "out"
    given = [out if word == "OUT" else word for word in words]
    finished = run(command(EVALUATE, [*given, "--python", python]), timeout=60)
    assert_user_error(finished, *parts)
    assert not out.exists()


def test_without_an_environment(tmp_path: Path) -> None:
    words = ["EXPORT", "--out", tmp_path / "out", "--python", tmp_path / "none"]
    assert_user_error(run(command(EVALUATE, words), timeout=60), "make eval-env", tmp_path / "none")
