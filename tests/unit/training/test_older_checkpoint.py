"""A checkpoint of an earlier version (``tests/data/checkpoint_8b7a41c``) resumes and converts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import load_common
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.loop import train
from tests.helpers.launch import command, run
from tests.helpers.tiny_run import read_metrics, read_routing
from tests.helpers.user_errors import user_error

OLD = Path(__file__).resolve().parents[2] / "data" / "checkpoint_8b7a41c"
STEP = 3  # of the checkpoint; the run has 5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run as the current directory: its paths are relative."""
    copy = shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(copy)
    return copy


def saved_config(folder: Path, *overrides: str) -> RunConfig:
    return load_saved_config(folder / "output" / "config.yaml", overrides)


def test_it_resumes(folder: Path, context: ParallelContext) -> None:
    """With the losses that its own program got when it continued."""
    expected = read_metrics(OLD / "output")
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5]

    last = train(saved_config(folder), context)

    assert last.name == "step_0000005"
    lines = read_metrics(folder / "output")
    assert lines[:STEP] == expected[:STEP]  # not trained again
    for line, old in zip(lines[STEP:], expected[STEP:], strict=True):
        assert (line["step"], line["tokens"]) == (old["step"], old["tokens"])
        for key in ("lm_loss", "grad_norm", "aux_vision", "aux_text", "lr_moe"):
            # Processors with other vector units round differently; a step is 1e-2 away.
            assert line[key] == pytest.approx(old[key], rel=1e-5), key
        assert line["skipped_samples"] == old["bad_samples"] == 1
    assert lines[STEP]["seconds"] != expected[STEP]["seconds"]
    old_routing = read_routing(OLD / "output")[STEP:]
    for record, old in zip(read_routing(folder / "output")[STEP:], old_routing, strict=True):
        for modality in ("vision", "text"):
            part, old_part = (r["layers"]["1"][modality] for r in (record, old))
            assert part["load"] == old_part["load"] and part["fraction"] == old_part["share"]
    progress = Progress.from_state(load_common(last)["progress"])
    assert (progress.step, progress.consumed_samples, progress.skipped_samples) == (5, 20, 1)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.seed=12", ("train.seed", 12, 11)),
        ("train.steps=9", ("train.steps", 9, 5)),
        ("stage.learning_rates.moe=2e-3", ("stage.learning_rates.moe", "0.002", "0.001")),
        ("optimizer.weight_decay=0.1", ("optimizer.weight_decay", "0.1")),
        ("moe.num_text_experts=3", ("moe.num_text_experts", 3, 1)),
    ],
)
def test_another_run_is_refused(
    override: str, parts: tuple[Any, ...], folder: Path, context: ParallelContext
) -> None:
    with user_error(*parts, f"step_000000{STEP}", "output directory"):
        train(saved_config(folder, override), context)


@pytest.mark.slow
def test_it_converts(folder: Path) -> None:
    out = folder / "exported"
    checkpoint = folder / "output" / "checkpoints" / f"step_000000{STEP}"
    words = ["export", "--ckpt", checkpoint, "--out", out]
    run(command("tools/convert.py", words), timeout=120).check()
    run(command("tools/convert.py", ["verify", checkpoint, out]), timeout=120).check()
    told = run(command("tools/convert.py", ["inspect", checkpoint]), timeout=120).check()
    assert "format version 1" in told.stdout and str(STEP) in told.stdout
