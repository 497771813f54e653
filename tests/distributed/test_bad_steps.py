"""Steps whose loss or gradient is not finite change nothing, are written down, and are limited;
saves that fail are one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.data.stream.order import SampleOrder
from tests.distributed.hooks import DELAY, LATE_STEP, POISONED_STEP
from tests.distributed.joint_runs import OVERLAP
from tests.helpers.checkpoints import plain_tensors
from tests.helpers.ranks import run_ranks, start_ranks
from tests.helpers.tiny_run import read_metrics, tiny_values, write_config
from tests.helpers.user_errors import assert_one_error

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

HOOKS = "tests.distributed.hooks:"


def _config(folder: Path, digits: Path, steps: int, **sections: Any) -> Path:
    values = tiny_values(digits, folder / "run")
    values["parallel"] = {"expert": 2}
    values["train"]["steps"] = steps
    values["checkpoint"] = {"interval": 1, "keep": 10}
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return write_config(folder / "run.yaml", values)


def test_one_bad_step_is_left_out(tmp_path: Path, digits: Path) -> None:
    """One micro-batch of one rank is not finite: no rank changes anything in that step.

    Nor does the next step wait for a gather of weights that nobody has updated.
    """
    config = _config(tmp_path, digits, steps=5, ddp=OVERLAP | {"bucket_size": 3000})

    job = start_ranks(tmp_path, [config], processes=2, hook=HOOKS + "poison_rank_1")
    assert job.wait() == [0, 0], job.text()

    output = tmp_path / "run"
    steps = read_metrics(output)
    bad = steps[POISONED_STEP - 1]
    assert not math.isfinite(bad["lm_loss"]) and not math.isfinite(bad["grad_norm"])
    assert all(math.isfinite(s["lm_loss"]) for s in steps if s is not bad)
    assert [line["skipped_steps"] for line in steps] == [0, 0, 1, 1, 1]
    assert "SKIPPED: loss or gradient is not finite" in job.text()
    # Rank 0 logs that another rank has waited for its data, but for step 1, which sets them up.
    waits = {line["step"]: line["data_wait_fraction"] * line["seconds"] for line in steps[1:]}
    assert [step for step, wait in waits.items() if wait > DELAY / 2] == [LATE_STEP]
    assert all(line["tflops_per_rank"] > 0 for line in steps)
    before, after, later = (
        plain_tensors(output / "checkpoints" / f"step_{POISONED_STEP + n:07d}") for n in (-1, 0, 1)
    )
    assert len(before) > 50
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    assert [name for name, value in before.items() if not torch.equal(value, later[name])] != []
    # The schedule has waited too.
    assert steps[POISONED_STEP]["lr_moe"] == bad["lr_moe"]

    (line,) = map(json.loads, (output / "skipped_steps.jsonl").read_text().splitlines())
    assert (line["step"], line["consumed_samples"]) == (POISONED_STEP, 16)
    records = (digits / "data" / "train.jsonl").read_text().splitlines()
    order = SampleOrder(len(records), seed=1234)
    assert line["dataset_indices"] == [order.sample_at(n) for n in range(16, 24)]
    parts = line["micro_batches"]
    assert [part["data_parallel_rank"] for part in parts] == [0, 1, 0, 1]
    assert [math.isfinite(part["loss"]) for part in parts] == [True, True, True, False]
    ids = [json.loads(records[i])["id"] for i in line["dataset_indices"]]
    assert [name for part in parts for name in part["record_ids"]] == ids

    # A start in the middle knows what was left out before.
    output.joinpath("checkpoints", "latest").write_text(f"step_{POISONED_STEP + 1:07d}\n")
    run_ranks(tmp_path, [config], processes=2)
    again = read_metrics(output)
    assert (again[-1]["lm_loss"], again[-1]["skipped_steps"]) == (steps[-1]["lm_loss"], 1)


def test_bad_steps_in_a_row_end_the_run(tmp_path: Path, digits: Path) -> None:
    """Weights that have left every bound; a save in the background is finished before the end."""
    rates = {"learning_rates": {"language": 1e30, "moe": 1e30}}
    train = {"max_skipped_steps": 2, "steps": 9}
    config = _config(tmp_path, digits, steps=9, stage=rates, train=train)

    job = start_ranks(
        tmp_path, [config, "checkpoint.interval=2", "checkpoint.asynchronous=true"], processes=2
    )

    assert job.wait() == [1, 1]
    steps = read_metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in steps] == [0, 1, 2]
    assert_one_error(job.text(), "2 steps", "step 3", tmp_path / "run" / "skipped_steps.jsonl")
    assert len((tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()) == 2
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["latest", "step_0000002"]


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_save_that_fails(background: str, tmp_path: Path, digits: Path) -> None:
    """A full disk: one sentence, nothing that looks like a checkpoint."""
    config = _config(tmp_path, digits, steps=3)

    job = start_ranks(
        tmp_path,
        [config, f"checkpoint.asynchronous={background}"],
        processes=2,
        hook=HOOKS + "small_files_only",
    )

    assert job.wait() == [1, 1], job.text()
    assert_one_error(job.text(), tmp_path / "run", "could not be written")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_???????"))
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()
    assert not list((tmp_path / "run").rglob("*.writing"))
