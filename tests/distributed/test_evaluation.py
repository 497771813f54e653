"""Evaluation beside a run changes nothing of it, ends with it and goes on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moiie_megatron.training.logging.evaluations import EVALUATION_FILE, read_evaluated
from tests.distributed.joint_runs import SAVE_EVERY, STEPS, joint_values
from tests.helpers.launch import TRAIN, command, is_running, run
from tests.helpers.pause import Pause
from tests.helpers.ranks import start_ranks, wait_until
from tests.helpers.tiny_run import read_metrics, write_config

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

QUESTIONS, NEW_TOKENS = 6, 3


def test_a_run_that_is_evaluated(digits: Path, single: Path, pair: Path, tmp_path: Path) -> None:
    """Killed between two checkpoints, and started again."""
    output, pictures = tmp_path / "run", digits / "data" / "images"
    (tmp_path / "set").mkdir()
    records = tmp_path / "set" / "records.jsonl"
    lines = [json.loads(s) for s in (digits / "data" / "test.jsonl").read_text().splitlines()]
    lines[1]["image"] = "broken.png"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines[:QUESTIONS]))
    values = joint_values(
        digits,
        output,
        single / "seed",
        parallel={"expert": 2},
        checkpoint={"interval": SAVE_EVERY, "keep": 3},
        evaluation={
            "interval": 2 * SAVE_EVERY,
            "sets": [{"name": "test", "records": str(records), "images": str(pictures)}],
            "max_new_tokens": NEW_TOKENS,
            "threads": 1,
        },
    )
    config = write_config(tmp_path / "run.yaml", values)
    pause = Pause(tmp_path / "pause")
    job = start_ranks(tmp_path, [config], 2, pause.before_step(2 * SAVE_EVERY + 1))
    pause.wait(2, job.text)
    wait_until(lambda: bool(read_evaluated(output)), job.text)
    watcher = json.loads((output / "evaluating.json").read_text())["pid"]
    job.kill()
    job.wait()
    wait_until(lambda: not is_running(watcher), job.text)

    again = run(command(TRAIN, [config], processes=2), timeout=200).check()

    results = read_evaluated(output)
    assert [(one.step, one.name) for one in results] == [(4, "test"), (STEPS, "test")]
    assert len((output / EVALUATION_FILE).read_text().splitlines()) == 2
    assert all((one.questions, one.errors) == (QUESTIONS, 1) for one in results)
    assert f"evaluation of step {STEPS} | test accuracy" in again.stdout
    board = EventAccumulator(str(output / "tensorboard")).Reload()
    logged = {event.step: event.value for event in board.Scalars("evaluation/test/accuracy")}
    assert logged == pytest.approx({one.step: one.value for one in results})
    assert [path.name for path in (output / "exports").iterdir()] == [f"step_{STEPS:07d}"]
    assert not (output / "evaluating.json").exists() and not (output / "running.json").exists()

    steps, undisturbed = read_metrics(output), read_metrics(pair / "ep2")
    for key in ("step", "lm_loss", "grad_norm", "aux_vision", "aux_text", "tokens"):
        assert [line[key] for line in steps] == [line[key] for line in undisturbed], key
