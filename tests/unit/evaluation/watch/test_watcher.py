"""A watcher evaluates the checkpoints of a run once each, as the built-in evaluation would."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.checkpoint.directory import checkpoints_directory, step_directory
from moiie_megatron.cli.watch import read_config, watch_run
from moiie_megatron.evaluation.ask import ask
from moiie_megatron.evaluation.questions import read_questions
from moiie_megatron.evaluation.score import Outcome
from moiie_megatron.evaluation.watch import exports, watcher
from moiie_megatron.evaluation.watch.watcher import WATCH_FILE, Watcher
from moiie_megatron.training.logging.evaluations import (
    EVALUATION_FILE,
    Evaluated,
    append_evaluated,
    read_evaluated,
)
from moiie_megatron.training.output_lock import OutputLock, _start, this_process
from tests.helpers.user_errors import user_error

NEW_TOKENS = 3


@pytest.fixture(scope="module")
def built_in(generator: Any, digits: Path) -> list[Outcome]:
    """What the built-in evaluation gets from the checkpoint, without Hugging Face files."""
    questions = read_questions(digits / "test.jsonl")
    batches = ask(generator, questions, digits / "images", max_new_tokens=NEW_TOKENS)
    return [outcome for batch in batches for outcome in batch]


@pytest.fixture(scope="module")
def records(
    built_in: list[Outcome], digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The test records: every other expected answer is what the model says."""
    lines = [json.loads(line) for line in (digits / "test.jsonl").read_text().splitlines()]
    for line, outcome in list(zip(lines, built_in, strict=True))[::2]:
        line["conversations"][-1]["value"] = outcome.answer
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def finished(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, which has come to its end at step 1."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def overrides(records: Path, digits: Path, **more: object) -> list[str]:
    one = {"name": "digits", "records": str(records), "images": str(digits / "images")}
    words = {"interval": 1000, "sets": [one], "max_new_tokens": NEW_TOKENS, "batch_size": 4}
    return [f"evaluation.{key}={json.dumps(value)}" for key, value in {**words, **more}.items()]


def test_a_run_that_has_ended(
    finished: Path, records: Path, built_in: list[Outcome], digits: Path, tmp_path: Path
) -> None:
    """The last checkpoint is evaluated although its step is no multiple of the interval."""
    watch_run(finished, overrides(records, digits))
    (result,) = read_evaluated(finished)
    assert (result.step, result.name, result.metric) == (1, "digits", "accuracy")
    assert (result.questions, result.errors) == (len(built_in), 0)
    answers = finished / "evaluation" / "step_0000001" / "digits.answers.jsonl"
    got = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    assert got == [outcome.answer for outcome in built_in]
    expected = [question.expected for question in read_questions(records)]
    right = [
        a.strip().lower() == str(e).strip().lower() for a, e in zip(got, expected, strict=True)
    ]
    assert result.value == sum(right) / len(right) >= 0.5

    # What is there is not done again.
    before = (finished / EVALUATION_FILE).read_bytes()
    export = finished / "exports" / "step_0000001"
    times = {file.name: file.stat().st_mtime_ns for file in export.iterdir()}
    watch_run(finished, overrides(records, digits))
    assert (finished / EVALUATION_FILE).read_bytes() == before
    assert times == {file.name: file.stat().st_mtime_ns for file in export.iterdir()}
    assert not (finished / WATCH_FILE).exists()

    # Another set is done on the export that is there.
    some = json.dumps(
        [
            {"name": "digits", "records": str(records), "images": str(digits / "images")},
            {"name": "two", "records": str(records), "images": str(digits / "images"), "limit": 2},
        ]
    )
    watch_run(finished, [*overrides(records, digits), f"evaluation.sets={some}"])
    assert [(one.name, one.questions) for one in read_evaluated(finished)] == [
        ("digits", len(built_in)),
        ("two", 2),
    ]
    assert times == {file.name: file.stat().st_mtime_ns for file in export.iterdir()}


def test_an_interrupted_evaluation_goes_on(
    finished: Path, records: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = watcher.ask_export

    def interrupted(model: Any, questions: Any, images: Path, **options: int) -> Any:
        for batch in real(model, questions, images, **options):
            asked.append(len(batch))
            yield batch
            if len(asked) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(watcher, "ask_export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch_run(finished, overrides(records, digits))
    assert read_evaluated(finished) == [] and not (finished / WATCH_FILE).exists()
    watch_run(finished, overrides(records, digits))
    (result,) = read_evaluated(finished)
    assert sum(asked) == result.questions == len(read_questions(records))


def test_a_broken_picture_costs_itself(
    finished: Path, records: Path, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.loads(line) for line in records.read_text().splitlines()[:4]]
    (tmp_path / "pictures").mkdir()
    for line in lines:
        (tmp_path / "pictures" / Path(line["image"]).name).write_bytes(
            (digits / "images" / line["image"]).read_bytes()
        )
        line["image"] = Path(line["image"]).name
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    for line in lines[1::2]:
        line["conversations"][-1]["value"] = "what no model says"
    lines[0]["image"] = "broken.png"
    lines[2]["image"] = "../pictures/outside.png"
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = overrides(file, tmp_path)
    words[1] = words[1].replace(str(tmp_path / "images"), str(tmp_path / "pictures"))
    with caplog.at_level(logging.INFO):
        watch_run(finished, words)
    (result,) = read_evaluated(finished)
    # The model's own answers were those of the first and the third question.
    assert (result.questions, result.errors, result.value) == (4, 2, 0.0)
    assert "2 could not be asked" in str(result)
    answers = finished / "evaluation" / "step_0000001" / "digits.answers.jsonl"
    errors = [json.loads(line)["metadata"]["error"] for line in answers.read_text().splitlines()]
    assert "broken.png" in errors[0] and "outside" in errors[2] and errors[1] == errors[3] == ""


def test_a_checkpoint_that_the_run_removes(
    finished: Path,
    records: Path,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While it is read; the other one is evaluated."""
    second_checkpoint(finished)
    real = exports.export_checkpoint

    def removing(checkpoint: Path, *words: Any, **options: Any) -> Path:
        if checkpoint.name == "step_0000000":
            shutil.rmtree(checkpoint)
        return real(checkpoint, *words, **options)

    monkeypatch.setattr(exports, "export_checkpoint", removing)
    with caplog.at_level(logging.INFO), user_error("1", "evaluations"):
        watch_run(finished, overrides(records, digits))
    assert "the run has removed the checkpoint first" in caplog.text
    assert [one.step for one in read_evaluated(finished)] == [1]
    assert [path.name for path in (finished / "exports").iterdir()] == ["step_0000001"]


def test_a_damaged_checkpoint_is_named(finished: Path, records: Path, digits: Path) -> None:
    (step_directory(finished, 1) / "common.pt").write_bytes(b"damaged")
    with user_error("1", "evaluations"):
        watch_run(finished, overrides(records, digits), wait=False)
    assert read_evaluated(finished) == []


def test_a_second_watcher_is_refused(finished: Path, records: Path, digits: Path) -> None:
    lock = OutputLock(finished, name=WATCH_FILE)
    lock._ours = this_process() | {"pid": 1, "ticks": _start(1)}
    lock.acquire()
    with user_error(finished, "evaluating the checkpoints", WATCH_FILE):
        watch_run(finished, overrides(records, digits))
    lock.release()


def test_a_step_that_is_trained_again_is_evaluated_again(
    finished: Path, records: Path, digits: Path
) -> None:
    config = read_config(finished, overrides(records, digits))
    Watcher(finished, config).run()
    (before,) = read_evaluated(finished)
    manifest = step_directory(finished, 1) / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    Watcher(finished, config).run()
    (after,) = read_evaluated(finished)
    assert (before.id != after.id) and before.value == after.value
    assert len((finished / EVALUATION_FILE).read_text().splitlines()) == 2


def test_it_waits_for_the_last_step(
    finished: Path, records: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is written while it waits is evaluated; behind ``latest`` none is."""
    second_checkpoint(finished)
    latest = checkpoints_directory(finished) / "latest"
    latest.write_text("step_0000000\n")
    seen: list[list[int]] = []

    def sleep(seconds: float) -> None:
        seen.append([one.step for one in read_evaluated(finished)])
        latest.write_text("step_0000001\n")

    monkeypatch.setattr(watcher.time, "sleep", sleep)
    config = read_config(finished, overrides(records, digits))
    Watcher(finished, config).run(poll=0.01)
    assert seen == [[0]]
    assert [one.step for one in read_evaluated(finished)] == [0, 1]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1, {500, 1500}), (0, {500}), (2, {500, 1000, 1500}), (9, {0, 500, 1000, 1500})],
)
def test_exports_that_are_kept(keep: int, kept: set[int], tmp_path: Path) -> None:
    """Two sets count for the best one, a step without one of them does not."""
    for step in (0, 500, 1000, 1500):
        (tmp_path / "exports" / f"step_{step:07d}").mkdir(parents=True)
    (tmp_path / "exports" / "step_0000250.writing").mkdir()
    (tmp_path / "exports" / "mine").mkdir()
    scores = {0: (0.1, 0.2), 500: (0.6, 0.8), 1000: (0.9, 0.4), 1500: (1.0, None)}
    for step, values in scores.items():
        for name, value in zip("ab", values, strict=True):
            if value is not None:
                append_evaluated(
                    tmp_path, Evaluated(step, name, "accuracy", value, 10, 0, 1.0, f"{step}{name}")
                )
    exports.prune_exports(tmp_path, read_evaluated(tmp_path), ["a", "b"], keep)
    left = {path.name for path in (tmp_path / "exports").iterdir()}
    assert left == {"mine", *(f"step_{step:07d}" for step in kept)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda words: [], ("evaluation.interval", "0")),
        (lambda words: [*words, "train.steps=7"], ("train.steps=7", "evaluation.KEY=VALUE")),
        (lambda words: [*words, "evaluation.interval=7"], ("evaluation.interval", "7", "1000")),
        (
            lambda words: [words[1].replace("images", "pictures"), *words[:1]],
            ("images", "pictures"),
        ),
    ],
)
def test_what_cannot_be_watched(
    change: Callable[[list[str]], list[str]],
    parts: tuple[str, ...],
    finished: Path,
    records: Path,
    digits: Path,
    tmp_path: Path,
) -> None:
    with user_error(*parts):
        watch_run(finished, change(overrides(records, digits)))
    with user_error(tmp_path / "none", "config.yaml"):
        watch_run(tmp_path / "none")
    assert not (finished / EVALUATION_FILE).exists() and not (finished / WATCH_FILE).exists()


def second_checkpoint(run: Path) -> None:
    """Another checkpoint of the run, of step 0."""
    shutil.copytree(step_directory(run, 1), step_directory(run, 0))
