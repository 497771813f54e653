"""Scores count exact matches, by kind, and show what needs the image."""

from __future__ import annotations

import pytest

from moiie_megatron.evaluation.score import Outcome, Score
from moiie_megatron.utils.text import same_answer


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [(" Yes\n", "yes", True), ("7", "7", True), ("7.", "7", False), ("17", "7", False)],
)
def test_same_answer(answer: str, expected: str, same: bool) -> None:
    assert same_answer(answer, expected) is same


def test_numbers() -> None:
    result = Score(
        (
            Outcome("a", "which", "7", "7", "1"),
            Outcome("b", "which", "3", "4", "1"),
            Outcome("c", "which", "1", "1", "1"),
            Outcome("d", "exists", "yes", "Yes", "no"),
        )
    )
    assert (result.accuracy, result.blanked_accuracy) == (0.75, 0.25)
    kinds = result.by_kind()
    assert list(kinds) == ["exists", "which"]
    assert kinds["which"].accuracy == pytest.approx(2 / 3)
    assert kinds["which"].blanked_accuracy == pytest.approx(1 / 3)
    values = result.to_json()
    assert values["questions"] == 4 and values["by_kind"]["exists"]["accuracy"] == 1.0
    assert values["outcomes"][1]["answer"] == "4"


def test_what_could_not_be_asked_counts_as_wrong() -> None:
    lost = Outcome("a", "all", "", "", "", error="no image")
    assert (Score((lost,)).accuracy, Score((lost,)).blanked_accuracy) == (0.0, 0.0)
