"""Benchmarks among what a watcher evaluates; lmms-eval itself is stood in for."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.cli.watch import watch_run
from moiie_megatron.config.schema import EvaluationConfig
from moiie_megatron.evaluation.benchmarks.catalogue import Benchmark
from moiie_megatron.evaluation.benchmarks.environment import EvalEnvironment
from moiie_megatron.evaluation.benchmarks.outcome import Outcome
from moiie_megatron.evaluation.benchmarks.run import Evaluation
from moiie_megatron.evaluation.watch import tasks
from moiie_megatron.training.logging.evaluations import read_evaluated
from tests.helpers.user_errors import user_error

SCORES = {"pope": 86.5, "mme": 1234.5, "gqa": None, "own_task": 0.25}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Evaluation]]:
    """lmms-eval has a task of its own; every call of a benchmark is listed."""
    environment = EvalEnvironment(Path("python"), "0.7.3", ("own_task",))
    monkeypatch.setattr(tasks, "find_environment", lambda *_: environment)
    calls: list[tuple[str, Evaluation]] = []

    def run(
        benchmarks: Sequence[Benchmark], evaluation: Evaluation, bar: Any
    ) -> Iterator[tuple[Outcome, bool]]:
        for one in benchmarks:
            calls.append((one.task, evaluation))
            with bar(one) as progress:
                progress(1, 1)
            score = SCORES[one.task]
            status: Any = "failed" if score is None else "scored"
            metric = one.metric or "accuracy"
            yield (
                Outcome(one.name, one.task, status, metric, score, requests=9, reason="broken."),
                False,
            )

    monkeypatch.setattr(tasks, "run", run)
    return calls


def test_scores_of_tasks(
    run: Path,
    ran: list[tuple[str, Evaluation]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Percentages become fractions; a task without a score is named, and does not stop others."""
    output = Path(shutil.copytree(run, tmp_path / "run"))
    words = ["evaluation.interval=1000", "evaluation.tasks=[GQA, POPE, mme, own_task]"]
    words += ["evaluation.task_limit=4", "evaluation.device=cpu"]
    with caplog.at_level(logging.WARNING), user_error("1", "evaluations"):
        watch_run(output, words)
    assert "GQA: not evaluated" in caplog.text and "failed, broken" in caplog.text
    found = {one.name: (one.metric, one.value, one.questions) for one in read_evaluated(output)}
    assert found == {
        "POPE": ("pope_f1_score", 0.865, 9),
        "mme": ("mme_perception_score", 1234.5, 9),
        "own_task": ("accuracy", 0.25, 9),
    }
    assert [task for task, _ in ran] == ["gqa", "pope", "mme", "own_task"]
    evaluation = ran[0][1]
    assert evaluation.target.arguments()["pretrained"] == str(output / "exports" / "step_0000001")
    assert evaluation.limit == 4 and evaluation.out.parent == output / "evaluation/step_0000001"

    # What failed is tried again, and nothing else.
    ran.clear()
    with user_error("1", "evaluations"):
        watch_run(output, words)
    assert [task for task, _ in ran] == ["gqa"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("MM-Vet", ("evaluation.tasks", "MM-Vet", "a judge")),
        ("DocVQA-test", ("evaluation.tasks", "DocVQA-test", "submission server")),
        ("Pop", ("evaluation.tasks", "Pop", "pope")),
    ],
)
def test_tasks_that_cannot_be_scored_here(
    name: str, parts: tuple[str, ...], ran: list[tuple[str, Evaluation]]
) -> None:
    with user_error(*parts):
        tasks.read_tasks(EvaluationConfig(interval=10, tasks=[name]))
