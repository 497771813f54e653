"""Runs that are killed, moved to another layout, or partly frozen."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.joint_runs import (
    OVERLAP,
    SAVE_EVERY,
    STEPS,
    VIRTUAL,
    assert_same_course,
    assert_same_validations,
    go_back,
    held_out,
    joint_values,
    read_validations,
)
from tests.helpers.checkpoints import plain_tensors
from tests.helpers.launch import TRAIN, command, kill_group, run, started
from tests.helpers.pause import Pause
from tests.helpers.tiny_run import read_metrics, read_routing, write_config
from tests.helpers.user_errors import assert_user_error

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


def test_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, digits: Path, single: Path, pair: Path
) -> None:
    """SIGKILL for all processes between two checkpoints, then the same command again.

    Communication overlaps with the passes, and it validates, unlike the undisturbed run.
    """
    output = tmp_path / "killed"
    values = joint_values(
        digits,
        output,
        single / "seed",
        parallel={"expert": 2},
        ddp=OVERLAP,
        checkpoint={"interval": SAVE_EVERY},
        data=held_out(digits, interval=SAVE_EVERY + 1),
    )
    arguments = [write_config(tmp_path / "killed.yaml", values)]
    pause, log = Pause(tmp_path / "pause"), tmp_path / "log"
    hook = pause.before_step(SAVE_EVERY + 2)
    real = command(TRAIN, arguments, processes=2, hook=hook, interpreter=sys.executable)
    with log.open("w") as file, started(real, stdout=file.fileno(), stderr=file.fileno()) as job:
        pause.wait(2, log.read_text)
        kill_group(job)
    assert len(read_metrics(output)) == SAVE_EVERY + 1
    assert [line["step"] for line in read_validations(output)] == [0, SAVE_EVERY + 1]
    checkpoints = output / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == f"step_{SAVE_EVERY:07d}"
    # What a kill in the middle of a save leaves behind, whether this one did or not.
    torn = checkpoints / f"step_{STEPS - 1:07d}.writing"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")

    again = run(command(TRAIN, arguments, processes=2), timeout=120).check()

    assert f"going on from {checkpoints / f'step_{SAVE_EVERY:07d}'}" in again.stdout
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        f"step_{STEPS - SAVE_EVERY:07d}",
        f"step_{STEPS:07d}",
    ]
    steps, undisturbed = read_metrics(output), read_metrics(pair / "ep2")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for key in ("lm_loss", "grad_norm", "aux_vision", "aux_text", "tokens"):
        assert [line[key] for line in steps] == [line[key] for line in undisturbed], key
    assert read_routing(output) == read_routing(pair / "ep2")
    assert_same_validations(output, single / "moiie")
    before = plain_tensors(pair / "ep2" / "checkpoints" / f"step_{STEPS:07d}")
    after = plain_tensors(checkpoints / f"step_{STEPS:07d}")
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


def test_resume_in_another_layout(pair: Path, quad: Path) -> None:
    """Two ranks with EP=2 begin, four with EP=2 and PP=2 in virtual stages finish."""
    steps = read_metrics(quad / "resumed")
    assert_same_course(steps, read_metrics(pair / "ep2"))
    # Not the copied lines: the other layout has written its own.
    assert steps[-1]["seconds"] != read_metrics(pair / "ep2")[-1]["seconds"]
    assert steps[0]["seconds"] == read_metrics(pair / "ep2")[0]["seconds"]


def test_resume_with_a_stage_without_experts(pair: Path, quad: Path) -> None:
    """Two ranks with virtual stages begin, four without finish; one of the pipeline ranks has no
    expert parameters to optimize."""
    steps, whole = read_metrics(quad / "one_layer"), read_metrics(pair / "one_layer")
    assert_same_course(steps, whole)
    assert steps[-1]["seconds"] != whole[-1]["seconds"]


def test_virtual_stages_resume_bit_for_bit(
    tmp_path: Path, digits: Path, single: Path, pair: Path
) -> None:
    whole = pair / "pp2virtual"
    output = go_back(whole, tmp_path / "run", STEPS - SAVE_EVERY)
    values = joint_values(
        digits, output, single / "seed", parallel=VIRTUAL, checkpoint={"interval": SAVE_EVERY}
    )
    file = write_config(tmp_path / "run.yaml", values)
    run(command(TRAIN, [file], processes=2), timeout=120).check()
    steps, wanted = read_metrics(output), read_metrics(whole)
    assert steps[-1]["seconds"] != wanted[-1]["seconds"]
    for key in ("step", "lm_loss", "grad_norm", "aux_vision", "aux_text"):
        assert [line[key] for line in steps] == [line[key] for line in wanted], key
    last = Path("checkpoints", f"step_{STEPS:07d}")
    before, after = plain_tensors(whole / last), plain_tensors(output / last)
    assert before.keys() == after.keys() == plain_tensors(pair / "ep2" / last).keys()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


def test_finished_run_is_left_alone(tmp_path: Path, single: Path, digits: Path) -> None:
    output = tmp_path / "dense"
    shutil.copytree(single / "dense", output)
    config = single / "dense.yaml"
    finished = run(command(TRAIN, [config, f"output={output}"]), timeout=60).check()
    assert "nothing to do" in finished.stdout
    assert read_metrics(output) == read_metrics(single / "dense")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=9", ("train.steps", 9, 6)),
        ("stage.learning_rates.connector=1e-5", ("stage.learning_rates.connector", "1e-05")),
        ("moe.variant=vanilla", ("moe.variant", "vanilla", "moiie")),
    ],
)
def test_another_run_is_not_taken_for_this_one(
    override: str, parts: tuple[object, ...], single: Path, tmp_path: Path
) -> None:
    """Whether it has come to its end or not."""
    output = shutil.copytree(single / "moiie", tmp_path / "moiie")
    words = [single / "moiie.yaml", f"output={output}", override]
    if "variant" in override:
        words += [f"moe.num_{group}_experts=null" for group in ("vision", "shared", "text")]
    refused = run(command(TRAIN, words), timeout=60)
    assert_user_error(refused, *parts, "checkpoint.init_from")


def test_connector_stage_whose_last_rank_has_nothing_to_train(single: Path, pair: Path) -> None:
    """Stage 1: only the connector changes, everything else keeps every bit."""
    steps = read_metrics(pair / "connector")
    assert [line["step"] for line in steps] == [1, 2]
    before = plain_tensors(single / "seed" / "checkpoints" / "step_0000002")
    after = plain_tensors(pair / "connector" / "checkpoints" / "step_0000002")
    weights = [name for name in before if not name.startswith("optimizer.")]
    changed = [name for name in weights if not torch.equal(before[name], after[name])]
    assert len(weights) > 50
    assert sorted(changed) == sorted(name for name in weights if name.startswith("connector."))
    assert len(changed) == 4


def test_connector_stage_resumes(pair: Path, quad: Path) -> None:
    """Two ranks begin, four with virtual stages go on; the last rank's optimizer has nothing."""
    steps, whole = read_metrics(quad / "connector"), read_metrics(pair / "connector")
    assert len(steps) == len(whole) == 2
    assert steps[1]["seconds"] != whole[1]["seconds"]
    for key in ("lm_loss", "grad_norm"):
        assert steps[1][key] == pytest.approx(whole[1][key], rel=1e-4)
    last = Path("checkpoints", "step_0000002")
    before, after = (
        plain_tensors(pair / "connector" / last),
        plain_tensors(quad / "connector" / last),
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.allclose(after[name], value, atol=1e-5), name
