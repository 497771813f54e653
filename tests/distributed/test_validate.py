"""``tools/validate.py``: the validation loss of a checkpoint, in another layout than its run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.joint_runs import STEPS, assert_same_losses, read_validations
from tests.helpers.launch import command, run
from tests.helpers.user_errors import assert_user_error

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

TOOL = "tools/validate.py"


def test_the_loss_that_the_run_has_logged(single: Path, tmp_path: Path) -> None:
    """Packed, on two ranks that share the experts; the run was one process without packing."""
    out = tmp_path / "loss.json"
    words = [single / "moiie", "parallel.expert=2", "data.packing=true", "--out", out]
    finished = run(command(TOOL, words, processes=2), timeout=120).check()
    found = json.loads(out.read_text())
    checkpoint = found.pop("checkpoint")
    assert Path(checkpoint).name == f"step_{STEPS:07d}" and checkpoint in finished.stdout
    logged = read_validations(single / "moiie")[-1]
    assert_same_losses(found | {"step": STEPS, "seconds": 0.0}, logged, 1e-6)
    assert "all samples: loss" in finished.stdout and "10 samples" in finished.stdout


def test_other_samples_than_those_of_the_run(single: Path, digits: Path) -> None:
    """A dense run, which had none."""
    data = digits / "data"
    words = [single / "seed", "--records", data / "text.jsonl", "--images", data / "images"]
    finished = run(command(TOOL, [*words, "data.validation.samples=3"]), timeout=60).check()
    assert "text only: loss" in finished.stdout and "3 samples" in finished.stdout
    refused = run(command(TOOL, words[:3]), timeout=60)
    assert_user_error(refused, "--records", data / "text.jsonl", "--images")
