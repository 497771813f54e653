"""Runs that are killed, asked to stop, or find a damaged checkpoint: nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from moiie_megatron.data.stream.order import SampleOrder
from tests.distributed.joint_runs import go_back
from tests.helpers.checkpoints import plain_tensors
from tests.helpers.launch import TRAIN, command, descendants, is_running, started, torchrun
from tests.helpers.pause import Pause
from tests.helpers.ranks import Job, in_writing, run_ranks, start_ranks, wait_until
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import read_metrics, read_routing, tiny_values, write_config
from tests.helpers.user_errors import assert_one_error

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 22  # the losses of 20 are needed to tell a spike
SAVE_EVERY = 4
OFTEN = "checkpoint.interval=2"
DATA = {"num_workers": 2, "packing": True}  # laid over the data section of every run here
LAST = f"step_{STEPS:07d}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The output of a run that nobody disturbed, beside its configuration."""

    def make(folder: Path) -> None:
        values = tiny_values(digits, folder / "run")
        values["data"] |= DATA
        # With packing the balance losses depend on which samples a rank has.
        values["moe"] = {"vision_aux_loss_coeff": 0.0, "text_aux_loss_coeff": 0.0}
        values["train"]["steps"] = STEPS
        values["checkpoint"] = {"interval": SAVE_EVERY, "keep": STEPS}
        values["parallel"] = {"expert": 2}
        run_ranks(folder, [write_config(folder / "run.yaml", values)], processes=2)

    return made_once(session_folder(tmp_path_factory) / "whole", make) / "run"


def words(whole: Path, output: Path, *overrides: str) -> list[str]:
    """Arguments that train the same run into another folder."""
    return [str(whole.with_suffix(".yaml")), f"output={output}", *overrides]


def assert_same_end(output: Path, whole: Path) -> None:
    """Every logged step and every tensor at the end, optimizer included, bit for bit."""
    ours, theirs = read_metrics(output), read_metrics(whole)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for key in ("lm_loss", "grad_norm", "aux_vision", "aux_text", "tokens"):
        assert [line[key] for line in ours] == [line[key] for line in theirs], key
    assert read_routing(output) == read_routing(whole)
    a, b = (plain_tensors(run / "checkpoints" / LAST) for run in (output, whole))
    assert a.keys() == b.keys()
    assert [name for name, value in a.items() if not torch.equal(value, b[name])] == []


def _has_nothing_left(job: Job) -> bool:
    return not job.left_behind()


def steps_done(output: Path) -> int:
    return len(read_metrics(output))


@pytest.mark.parametrize("in_background", [False, True], ids=["in_front", "in_background"])
def test_kills_in_a_save_and_between_steps(
    in_background: bool, tmp_path: Path, whole: Path
) -> None:
    """SIGKILL in the middle of the first save, then between two steps, then to the end."""
    output = tmp_path / "run"
    arguments = words(whole, output, OFTEN, f"checkpoint.asynchronous={in_background}".lower())
    for number, step in enumerate((None, 6)):
        pause = Pause(tmp_path / f"pause{number}")
        hook = pause.in_save() if step is None else pause.before_step(step)
        job = start_ranks(tmp_path, arguments, 2, hook, interpreter=sys.executable)
        pause.wait(2, job.text)
        assert step is not None or in_writing(output)
        job.kill()
        assert job.wait() == [-signal.SIGKILL] * 2, job.text()
        wait_until(partial(_has_nothing_left, job), job.text, timeout=5)

    last = run_ranks(tmp_path, words(whole, output), processes=2)

    # In the background a save is complete when the next one begins, or earlier.
    complete = (2, 4) if in_background else (4,)
    found = [f"going on from {output}/checkpoints/step_{n:07d} " in last.text() for n in complete]
    assert any(found)
    assert in_writing(output) == []
    assert_same_end(output, whole)


def test_any_rank_can_be_asked_to_stop(tmp_path: Path, whole: Path) -> None:
    """By time, by SIGTERM for one rank and its children, by SIGUSR1 in the middle of a save."""
    output, next_output = tmp_path / "run", tmp_path / "next"
    arguments = words(whole, output)
    following = words(whole, next_output)

    job = run_ranks(
        tmp_path, [*arguments, "train.exit_after_minutes=0.0001", *following], processes=2
    )
    assert f"Stopped after step 1 of {STEPS} because of train.exit_after_minutes" in job.text()
    assert not next_output.exists()

    pause = Pause(tmp_path / "term")
    hook = pause.before_step(4)  # the fifth of the run
    job = start_ranks(tmp_path, [*arguments, OFTEN], 2, hook, interpreter=sys.executable)
    pause.wait(2, job.text)
    os.killpg(job.pids[1], signal.SIGTERM)
    pause.wait_for_signal(1, job.text)
    begin = time.monotonic()
    pause.release()
    assert job.wait() == [0, 0], job.text()
    assert time.monotonic() - begin < 30
    assert "because of signal SIGTERM: the same command goes on from" in job.text()
    assert steps_done(output) == 5
    assert (output / "checkpoints" / "latest").read_text() == "step_0000005\n"

    pause = Pause(tmp_path / "usr1")
    background = [*arguments, OFTEN, "checkpoint.asynchronous=true"]
    job = start_ranks(tmp_path, background, 2, pause.in_save(), interpreter=sys.executable)
    pause.wait(2, job.text)
    assert in_writing(output)
    job.kill(signal.SIGUSR1, ranks=[0])
    pause.release()
    assert job.wait() == [0, 0], job.text()
    assert "because of signal SIGUSR1" in job.text()
    # The save of step 6 was held up, and with it the one of step 8.
    assert 6 <= steps_done(output) <= 9
    assert in_writing(output) == job.left_behind() == []

    run_ranks(tmp_path, arguments, processes=2)
    assert_same_end(output, whole)


def _cut_tensors(checkpoint: Path) -> str:
    file = checkpoint / "__1_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    return f"{file.name} has {size - 1} bytes instead of {size}"


def _lose_tensors(checkpoint: Path) -> str:
    last = sorted(checkpoint.glob("*.distcp"))[-1]
    last.unlink()
    return f"{last.name} is missing"


def _spoil_metadata(checkpoint: Path) -> str:
    file = checkpoint / ".metadata"
    file.write_bytes(bytes(file.stat().st_size))
    return ".metadata is not what was written"


def _lose_all(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint)
    return f"names {LAST}, which is not there"


@pytest.mark.parametrize("damage", [_cut_tensors, _lose_tensors, _spoil_metadata, _lose_all])
def test_the_one_before_a_damaged_checkpoint_is_used(
    damage: Callable[[Path], str], tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    what = damage(output / "checkpoints" / LAST)

    job = run_ranks(tmp_path, words(whole, output), processes=2)

    warnings = [line for line in job.text().splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and what in warnings[0] and str(output) in warnings[0]
    assert (
        f"going on from {output}/checkpoints/step_{STEPS // SAVE_EVERY * SAVE_EVERY:07d}"
        in job.text()
    )
    assert_same_end(output, whole)


def test_only_damaged_checkpoints(tmp_path: Path, whole: Path) -> None:
    """One sentence; the run does not silently start again."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for checkpoint in (output / "checkpoints").glob("step_*"):
        (checkpoint / "common.pt").unlink()

    job = start_ranks(tmp_path, words(whole, output), processes=2)

    assert job.wait() == [1, 1]
    assert_one_error(job.text(), output / "checkpoints", "No checkpoint", "restore")


@pytest.mark.parametrize(
    ("degrees", "processes"),
    [(["parallel.pipeline=2"], 2), (["parallel.tensor=2"], 2), ([], 1)],
    ids=["pp2", "tp2", "single"],
)
def test_another_layout_goes_on(
    degrees: Sequence[str],
    processes: int,
    tmp_path: Path,
    digits: Path,
    whole: Path,
) -> None:
    """The last quarter on another layout than EP=2: same samples, same losses.

    Any loss counts as a spike here, so that the samples of a step are written down.
    """
    back = STEPS * 3 // 4 // SAVE_EVERY * SAVE_EVERY
    output = go_back(whole, tmp_path / "run", back)
    extra = ["train.deterministic=true", f"profile.steps=[{back + 1},{back + 2}]"]
    extra += [f"profile.ranks=[{processes - 1}]", "train.spike_factor=0.01"]

    job = run_ranks(
        tmp_path,
        words(whole, output, "parallel.expert=1", *degrees, *extra),
        processes,
        timeout=120,
    )

    assert f"going on from {output}/checkpoints/step_{back:07d}" in job.text()
    ours, theirs = read_metrics(output), read_metrics(whole)
    assert len(ours) == STEPS
    for key in ("tokens", "label_tokens", "image_fraction"):
        assert [line[key] for line in ours] == [line[key] for line in theirs], key
    for key in ("lm_loss", "grad_norm"):
        values, expected = ([line[key] for line in lines] for lines in (ours, theirs))
        assert values == pytest.approx(expected, rel=0, abs=1e-4), key
    spikes = [json.loads(s) for s in (output / "loss_spikes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in spikes] == [21, 22]
    assert ["spike" in line for line in ours] == [False] * 20 + [True] * 2
    records = [json.loads(s) for s in (digits / "data" / "train.jsonl").read_text().splitlines()]
    order = SampleOrder(len(records), seed=1234)
    for line in spikes:
        indices = [order.sample_at(n) for n in range(8 * line["step"] - 8, 8 * line["step"])]
        assert line["dataset_indices"] == indices
        names = [name for batch in line["micro_batches"] for name in batch["record_ids"]]
        assert sorted(names) == sorted(records[i]["id"] for i in indices)
    traces = [path.name for path in (output / "profile").iterdir()]
    assert traces == [f"steps_{back + 1}-{back + 2}_rank_{processes - 1}.json"]


def test_torchrun_restarts_by_itself(tmp_path: Path, whole: Path) -> None:
    """One worker is killed: all are started again and go on.  Then torchrun is asked to stop."""
    output, log, pause = tmp_path / "run", tmp_path / "log", Pause(tmp_path / "pause")
    start = torchrun(2, "--max-restarts=1", interpreter=sys.executable)
    start += ["tests/helpers/hooked.py", pause.before_step(4), TRAIN, *words(whole, output, OFTEN)]
    with log.open("w") as file, started(start, stdout=file.fileno(), stderr=file.fileno()) as job:
        pause.wait(2, log.read_text)
        os.kill(_workers(job.pid)[1], signal.SIGKILL)
        pause.release(attempt=0)
        pause.wait(2, log.read_text, attempt=1)
        job.terminate()
        for rank in range(2):
            pause.wait_for_signal(rank, log.read_text)
        pause.release()
        job.wait(60)

    assert "going on from" in log.read_text() and "because of signal SIGTERM" in log.read_text()
    done = read_metrics(output)
    assert len(done) == 6  # from step 2 on: three more, and the one that was held up
    assert (output / "checkpoints" / "latest").read_text() == f"step_{len(done):07d}\n"
    losses = [[line["lm_loss"] for line in run] for run in (done, read_metrics(whole))]
    assert losses[0] == losses[1][: len(done)]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_nothing_outlives_a_killed_launcher(tmp_path: Path, whole: Path) -> None:
    """SIGKILL for torchrun alone, which can tell nobody: ranks and data workers end, too."""
    output, log, pause = tmp_path / "run", tmp_path / "log", Pause(tmp_path / "pause")
    start = command(
        TRAIN,
        words(whole, output),
        processes=2,
        hook=pause.before_step(2),
        interpreter=sys.executable,
    )
    with log.open("w") as file, started(start, stdout=file.fileno(), stderr=file.fileno()) as job:
        pause.wait(2, log.read_text)
        family = descendants(job.pid)
        ranks = set(_workers(job.pid).values())
        assert len(ranks) == 2 and len(family) >= 2 + 2 * DATA["num_workers"]
        job.kill()
        job.wait(10)
        try:
            wait_until(lambda: not any(map(is_running, family)), log.read_text, timeout=10)
        finally:
            for pid in filter(is_running, family):
                os.kill(pid, signal.SIGKILL)


def _workers(launcher: int) -> dict[int, int]:
    """The processes below a launcher by rank."""
    found: dict[int, int] = {}
    for pid in descendants(launcher):  # older ones first, so not a rank's own children
        match = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
        if match:
            found.setdefault(int(match[1]), pid)
    return found
