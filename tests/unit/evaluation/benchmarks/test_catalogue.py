from __future__ import annotations

import pytest

from moiie_megatron.evaluation.benchmarks.catalogue import BENCHMARKS, PAPER, averaged, chosen
from tests.helpers.user_errors import user_error


def test_the_paper_has_fourteen_and_two_for_pictures() -> None:
    assert len(PAPER) == 16
    assert [b.name for b in PAPER if not averaged(b)] == ["MME", "MMVP"]
    assert all(b.percent for b in PAPER if averaged(b))
    assert all(b.judge is None or b.submission is None for b in BENCHMARKS)
    assert len({b.task for b in BENCHMARKS}) == len({b.name for b in BENCHMARKS}) == 20


@pytest.mark.parametrize(
    ("names", "tasks"),
    [
        (["POPE", "pope"], ["pope"]),
        (["mm-vet", " MMVP"], ["mmvet", "mmvp"]),
        (["docvqa_test", "DocVQA"], ["docvqa_test", "docvqa_val"]),
        (["realworldqa"], ["realworldqa"]),
    ],
)
def test_names_and_tasks(names: list[str], tasks: list[str]) -> None:
    found = chosen(names, ["realworldqa", "pope"])
    assert [benchmark.task for benchmark in found] == tasks


def test_another_task_of_lmms_eval_reports_all_its_metrics() -> None:
    (benchmark,) = chosen(["realworldqa"], ["realworldqa"])
    assert (benchmark.metric, benchmark.data, averaged(benchmark)) == (None, (), False)


def test_a_wrong_name_is_named_with_near_ones() -> None:
    with user_error("--tasks", "popee", "pope"):
        chosen(["GQA", "popee"], [])
    with user_error("--tasks"):
        chosen(["", " "], [])
