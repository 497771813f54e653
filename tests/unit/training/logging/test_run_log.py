"""Which steps get a line, what it covers, and what a resumed run keeps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moiie_megatron.mcore.device import Device
from moiie_megatron.routing_stats.counters import RouterLosses
from moiie_megatron.routing_stats.scalars import routing_scalars
from moiie_megatron.training.logging.evaluations import Evaluated, append_evaluated
from moiie_megatron.training.logging.run_log import RunLog, StepReport
from moiie_megatron.training.step import StepResult
from tests.unit.config.minimal import load_minimal
from tests.unit.routing_stats.routing_records import record

RESULT = StepResult(
    lm_loss=2.5,
    learning_rates={"moe": 1e-3},
    grad_norm=1.0,
    label_tokens=10,
    tokens=100,
    image_tokens=40,
    positions=125,
    squared_lengths=5000,
    updated=True,
    also_summed=[],
    micro_batch_losses=torch.zeros(1),
)
LOSSES = RouterLosses({"vision": 2.25, "text": 2.0})
ROUTES = {k: v for k, v in record(0, [10, 10, 0, 0], [0, 5, 5, 10]).items() if k != "step"}


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def open_log(
    folder: Path, start: int = 0, rank: int = 0, clock: Clock | None = None, *words: str
) -> RunLog:
    overrides = [f"output={folder / 'run'}", "log.interval=2", *words]
    return RunLog(
        load_minimal(folder, overrides),
        SimpleNamespace(rank=rank, size=2, device=Device("cpu", "gloo")),
        start_step=start,
        total_steps=5,
        clock=clock or Clock(),
    )


def report(log: RunLog, step: int) -> None:
    log.step(StepReport(step, RESULT, LOSSES if log.is_due(step) else None))


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def test_lines_at_the_interval_and_at_both_ends(tmp_path: Path) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    for step in range(1, 6):
        clock.now += 0.25
        report(log, step)
    log.close()
    metrics = lines(tmp_path, "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 4, 5]
    assert metrics[2]["lm_loss"] == 2.5 and metrics[2]["aux_vision"] == 2.25
    assert metrics[2]["tokens"] == 100 and metrics[2]["image_fraction"] == 0.4
    assert metrics[2]["padding_fraction"] == pytest.approx(0.2)
    # Two steps lie between this line and the one before, with 200 tokens.
    assert metrics[2]["seconds"] == pytest.approx(0.5)
    assert metrics[2]["tokens_per_second"] == pytest.approx(400)
    assert metrics[2]["lr_moe"] == 1e-3 and "spike" not in metrics[2]


def test_memory_of_gpus_is_in_the_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = open_log(tmp_path)
    peaks = {"memory_allocated_gib": 61.25, "memory_reserved_gib": 70.5}
    with caplog.at_level("INFO"):
        log.step(StepReport(1, RESULT, LOSSES, memory=peaks))
        log.step(StepReport(2, RESULT, LOSSES))
    log.close()
    with_gpu, without = lines(tmp_path, "metrics.jsonl")
    assert with_gpu.items() >= peaks.items() and not without.keys() & peaks.keys()
    assert " | memory 61.2 GiB (70.5 reserved) | left " in caplog.messages[0]
    assert "memory" not in caplog.messages[1]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(1, 4):
        report(log, step)
        log.routing(step, ROUTES)
    log.close()
    with (tmp_path / "run" / "routing.jsonl").open("a") as file:
        file.write('{"step": 4, "cut o')
    again = open_log(tmp_path, start=2)
    report(again, 3)
    report(again, 4)
    again.routing(4, ROUTES)
    again.close()
    assert [line["step"] for line in lines(tmp_path, "metrics.jsonl")] == [1, 2, 4]
    routing = lines(tmp_path, "routing.jsonl")
    assert [line["step"] for line in routing] == [1, 2, 4]
    assert routing[-1] == {"step": 4, **ROUTES}


def test_other_ranks_and_dense_models_write_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path, rank=1)
    report(log, 1)
    log.routing(1, ROUTES)
    log.close()
    assert not (tmp_path / "run").exists()
    dense = open_log(tmp_path)
    dense.routing(1, None)
    dense.close()
    assert lines(tmp_path, "routing.jsonl") == []


def test_routing_reaches_tensorboard(tmp_path: Path) -> None:
    scalars = routing_scalars(ROUTES)
    # Of ten image tokens all take V0, and none takes an expert that is not theirs.
    assert scalars["expert_fraction_vision/layer_03/vision.0"] == 1.0
    assert "expert_fraction_vision/layer_03/text.0" not in scalars
    assert scalars["rank_load_max_over_mean/layer_11"] == 1.0
    assert scalars["dead_experts/layer_03"] == 0
    assert scalars["dispatched_bytes/vision"] == 2 * 7 * 100
    assert sum(name.startswith("load_entropy_") for name in scalars) == 4
    log = open_log(tmp_path)
    log.routing(3, ROUTES)
    log.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(scalars)
    (event,) = events.Scalars("expert_fraction_text/layer_11/shared.0")
    assert (event.step, event.value) == (3, 0.5)


def test_a_pause_is_no_time_of_a_step(tmp_path: Path) -> None:
    """Neither the pause counts nor do the steps before it get lost."""
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    report(log, 2)
    report(log, 3)
    clock.now += 0.25
    with log.paused():
        clock.now += 10
    report(log, 4)
    log.close()
    line = lines(tmp_path, "metrics.jsonl")[-1]
    assert line["step"] == 4 and line["seconds"] == pytest.approx(0.25)
    assert line["tokens_per_second"] == pytest.approx(800)


def test_what_the_operator_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    with caplog.at_level("INFO", logger="moiie_megatron"):
        clock.now += 1
        counts = {"skipped_samples": 3, "skipped_steps": 1}
        log.step(StepReport(1, RESULT, LOSSES, data_wait=0.25, **counts, spike=4.0))
        log.saved(Path("runs/step_0000001"), 0.25)
    log.close()
    assert caplog.messages == [
        "step 1/5 | loss 2.5000 | aux vision 2.250 text 2.000 | lr 1.00e-03 | grad 1.000 | "
        "100 tok/s | 0.1 GFLOP/s/rank | data wait 25.0% | image 40% | left 00:00:04"
        " | SPIKE: 4.0 x the usual loss",
        "saved runs/step_0000001 in 0.2 s",
    ]
    (line,) = lines(tmp_path, "metrics.jsonl")
    assert (line["skipped_samples"], line["skipped_steps"], line["spike"]) == (3, 1, 4.0)


def test_results_of_evaluations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They come after later steps, and are logged at their own; those from before once more."""
    words = ("evaluation.interval=500", "evaluation.tasks=[POPE]")

    def evaluated(step: int, value: float) -> None:
        one = Evaluated(step, "POPE", "f1", value, 10, 0, 2.0, f"id{step}")
        append_evaluated(tmp_path / "run", one)

    (tmp_path / "run").mkdir()
    evaluated(500, 0.25)
    with (tmp_path / "run" / "evaluation.jsonl").open("a") as file:
        file.write("cut off\n")
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, 0, 0, None, *words)
    report(log, 2)
    assert "POPE" not in caplog.text
    evaluated(1000, 0.5)
    report(log, 4)
    assert "evaluation of step 1000 | POPE f1 50.0% (10 questions, 2 s)" in caplog.text
    evaluated(1500, 0.75)
    log.close()
    assert "step 500 " not in caplog.text and "step 1500 | POPE f1 75.0%" in caplog.text
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = {event.step: event.value for event in board.Scalars("evaluation/POPE/f1")}
    assert found == {500: 0.25, 1000: 0.5, 1500: 0.75}
