from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moiie_megatron.evaluation.benchmarks.catalogue import Benchmark, chosen
from moiie_megatron.evaluation.benchmarks.data_sets import DataPlaces
from moiie_megatron.evaluation.benchmarks.environment import JudgeServer
from moiie_megatron.evaluation.benchmarks.outcome import Outcome
from moiie_megatron.evaluation.benchmarks.run import Evaluation, command, open_directory, run
from tests.helpers.user_errors import user_error
from tests.unit.evaluation.benchmarks.stand_in import calls, evaluation


def evaluate(names: list[str], job: Evaluation) -> tuple[list[Outcome], list[bool], list[Any]]:
    """Outcomes, which of them are from before, and the progress that was shown."""
    shown: list[Any] = []

    @contextmanager
    def progress(benchmark: Benchmark) -> Iterator[Any]:
        yield lambda done, total: shown.append((benchmark.name, done, total))

    open_directory(job)
    found = list(run(chosen(names, ["mine"]), job, progress))
    return [outcome for outcome, _ in found], [old for _, old in found], shown


def test_a_score_with_its_counts(tmp_path: Path) -> None:
    (outcome,), _, shown = evaluate(["pope"], evaluation(tmp_path))
    assert (outcome.status, outcome.metric, outcome.score) == ("scored", "pope_f1_score", 50.0)
    assert outcome.metrics["pope_accuracy"] == 0.75
    assert "exact_match_stderr" not in outcome.metrics and "alias" not in outcome.metrics
    assert (outcome.requests, outcome.errors, outcome.reason) == (2, 1, "no picture")
    assert shown == [("POPE", 0, 2), ("POPE", 2, 2)]
    assert (tmp_path / "out/pope/lmms_eval.log").read_text() == ""


def test_a_task_that_fails_does_not_end_the_others_and_is_tried_again(tmp_path: Path) -> None:
    job = evaluation(tmp_path)
    outcomes, old, _ = evaluate(["vqav2", "pope", "mine"], job)
    assert [outcome.status for outcome in outcomes] == ["failed", "scored", "scored"]
    assert outcomes[0].reason.startswith("ValueError: no such split (see ")
    assert outcomes[2].metrics["exact_match"] == 0.25
    assert old == [False] * 3
    again, old, _ = evaluate(["vqav2", "pope", "mine"], job)
    assert old == [False, True, True]
    assert again[1:] == outcomes[1:]
    assert [len(calls(job.out / task)) for task in ("vqav2_val", "pope")] == [2, 1]


def test_a_judge(tmp_path: Path) -> None:
    (outcome,), _, _ = evaluate(["mmvet"], evaluation(tmp_path))
    assert (outcome.status, outcome.score) == ("unscored", None)
    judge = JudgeServer("http://judge/v1", "wise", "secret")
    job = evaluation(tmp_path, judge=judge)
    outcomes, old, _ = evaluate(["mmvet", "hallusionbench", "pope"], job)
    assert (outcomes[0].status, outcomes[0].score, old[0]) == ("scored", 40.0, False)
    without, judged = calls(job.out / "mmvet")
    assert "--predict_only" in without[0] and "--predict_only" not in judged[0]
    assert judged[2]["OPENAI_API_URL"] == "http://judge/v1"
    assert (judged[2]["OPENAI_API_KEY"], judged[2]["MODEL_VERSION"]) == ("secret", "wise")
    assert "secret" not in " ".join(judged[0])
    ((_, _, variables),) = calls(job.out / "hallusion_bench_image")
    assert variables["OPENAI_API_URL"] == "http://judge/v1/chat/completions"
    ((_, _, variables),) = calls(job.out / "pope")
    assert variables.get("OPENAI_API_KEY") != "secret"


def test_a_file_for_a_submission_server(tmp_path: Path) -> None:
    (outcome,), _, _ = evaluate(["vqav2-test"], evaluation(tmp_path))
    assert (outcome.status, outcome.score) == ("submission", None)
    assert [Path(file).name for file in outcome.files] == ["answers.json"]
    assert "https://eval.ai/" in outcome.reason


def test_offline_without_data_nothing_is_started(tmp_path: Path) -> None:
    job = evaluation(tmp_path)
    places = DataPlaces(tmp_path, tmp_path / "cache", offline=True)
    job = Evaluation(job.target, job.out, job.environment, places)
    (outcome,), _, _ = evaluate(["pope"], job)
    assert (outcome.status, outcome.is_final) == ("no data", False)
    assert calls(job.out / "pope") == []


def test_processes_start_where_the_data_are(tmp_path: Path) -> None:
    job = evaluation(tmp_path)
    evaluate(["pope"], job)
    ((_, directory, _),) = calls(job.out / "pope")
    assert Path(directory) == tmp_path


def test_the_command(tmp_path: Path) -> None:
    job = evaluation(tmp_path, batch_size=4, limit=10, max_new_tokens=32, include=tmp_path)
    words = command(chosen(["pope"], [])[0], job)
    assert words[:6] == [str(tmp_path / "python"), "-m", "lmms_eval", "eval", "--model", words[5]]
    given = dict(zip(words[4::2], words[5::2], strict=False))
    assert given["--model"] == "moiie_server"
    assert given["--model_args"] == (
        "base_url=http://127.0.0.1:9/v1,model=tiny,timeout=600,max_retries=3,"
        f"answers={tmp_path}/out/pope/answers.jsonl,max_new_tokens=32"
    )
    assert " --limit 10 --include_path " in " ".join(words)


def test_a_directory_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    job = evaluation(tmp_path, limit=10)
    open_directory(job)
    open_directory(job)
    with user_error(job.out, "limit", 10, "None"):
        open_directory(evaluation(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    other = Evaluation(job.target, tmp_path / "other", job.environment, job.places)
    with user_error(tmp_path / "other", "evaluation.json"):
        open_directory(other)
    with user_error("a,b", ","):
        open_directory(Evaluation(job.target, tmp_path / "a,b", job.environment, job.places))
    assert json.loads((job.out / "evaluation.json").read_text())["limit"] == 10


def test_a_damaged_outcome_is_named(tmp_path: Path) -> None:
    job = evaluation(tmp_path)
    evaluate(["pope"], job)
    (job.out / "pope" / "outcome.json").write_text('{"benchmark": "POPE"}')
    with user_error(job.out / "pope" / "outcome.json", "delete it"):
        evaluate(["pope"], job)
