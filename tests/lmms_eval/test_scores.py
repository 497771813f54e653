"""Unmodified tasks of lmms-eval on local sets score as computed by hand (``scripted.py``)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.evaluation.benchmarks.catalogue import BENCHMARKS, PAPER, Benchmark
from moiie_megatron.evaluation.benchmarks.outcome import Outcome, read_outcome
from moiie_megatron.evaluation.benchmarks.plugin.kept_answers import read_answers
from tests.lmms_eval.scripted import METRICS, SCORES, judged, scripted
from tests.lmms_eval.stub_server import StubServer, serving, text_of

SUBMITTED = [benchmark for benchmark in BENCHMARKS if benchmark.submission]


@pytest.fixture(scope="module")
def judge() -> Iterator[StubServer]:
    with serving(lambda messages: judged(text_of(messages)), ("gpt-4", "judge")) as server:
        yield server


@pytest.fixture(scope="module")
def outcomes(
    eval_python: str,
    variables: dict[str, str],
    sets: Path,
    judge: StubServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Outcome]:
    """All tasks in two processes of lmms-eval: a judge is reached in two ways."""
    found = {}
    for suffix in ("", "/chat/completions"):
        chosen = [
            b for b in (*PAPER, *SUBMITTED) if (b.judge.url_suffix if b.judge else "") == suffix
        ]
        out = tmp_path_factory.mktemp("scores")
        with serving(lambda messages: scripted(text_of(messages))) as server:
            _lmms_eval(eval_python, chosen, server.url, out, sets, variables, judge.url + suffix)
        assert all(not a.error for a in read_answers(out / "answers.jsonl").values())
        found |= {b.name: read_outcome(b, out, has_judge=True, seconds=0.0) for b in chosen}
    return found


def _lmms_eval(
    python: str,
    benchmarks: list[Benchmark],
    url: str,
    out: Path,
    sets: Path,
    variables: dict[str, str],
    judge_url: str,
) -> None:
    command = [python, "-m", "lmms_eval", "eval", "--model", "moiie_server", "--log_samples"]
    command += ["--model_args", f"base_url={url},model=tiny,answers={out / 'answers.jsonl'}"]
    command += ["--tasks", ",".join(b.task for b in benchmarks), "--batch_size", "4"]
    command += ["--output_path", str(out / "lmms_eval")]
    judging = {"API_TYPE": "openai", "OPENAI_API_KEY": "none", "OPENAI_API_URL": judge_url}
    with (out / "lmms_eval.log").open("w") as log:
        subprocess.run(
            command,
            cwd=sets,
            env={**variables, **judging, "MODEL_VERSION": "judge"},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )


@pytest.mark.parametrize("benchmark", PAPER, ids=lambda b: b.name)
def test_scores_are_those_by_hand(outcomes: dict[str, Outcome], benchmark: Benchmark) -> None:
    outcome = outcomes[benchmark.name]
    assert outcome.status == "scored", outcome.reason
    assert outcome.score == pytest.approx(SCORES[benchmark.name], abs=0.01)


@pytest.mark.parametrize("name", METRICS)
def test_other_metrics_too(outcomes: dict[str, Outcome], name: str) -> None:
    assert {key: outcomes[name].metrics[key] for key in METRICS[name]} == pytest.approx(
        METRICS[name]
    )


@pytest.mark.parametrize("benchmark", SUBMITTED, ids=lambda b: b.name)
def test_files_for_submission(outcomes: dict[str, Outcome], benchmark: Benchmark) -> None:
    outcome = outcomes[benchmark.name]
    assert (outcome.status, outcome.score) == ("submission", None)
    files = [Path(file) for file in outcome.files]
    assert files
    answers: Any = [json.loads(f.read_text()) for f in files if f.suffix == ".json"]
    if benchmark.name == "DocVQA-test":
        expected = [{"questionId": 100 + i, "answer": a} for i, a in enumerate(["Seven", "eighs"])]
        assert expected[0] in answers[0] and expected[1] in answers[0]


def test_the_script_asks_every_set() -> None:
    assert set(SCORES) == {benchmark.name for benchmark in PAPER}
