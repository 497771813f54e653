"""Runs that are killed, asked to stop, or find a damaged checkpoint: nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from moiie_megatron.data.stream.order import SampleOrder
from tests.distributed.conftest import go_back
from tests.distributed.test_resume import plain_tensors
from tests.helpers.launch import TRAIN, descendants, started, torchrun
from tests.helpers.ranks import Job, in_writing, run_ranks, start_ranks, wait_until
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import read_metrics, read_routing, tiny_values, write_config

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


def _new_save(output: Path, known: set[Path]) -> bool:
    """``known`` folders are an earlier, killed save's; one that is written anew is empty first."""
    return bool(set(in_writing(output)) - known)


def _has_done(job: Job, step: int) -> bool:
    return f"step {step}/" in job.text()


def _has_nothing_left(job: Job) -> bool:
    return not job.left_behind()


def steps_done(output: Path) -> int:
    return len(read_metrics(output))


def test_five_kills(tmp_path: Path, whole: Path) -> None:
    """SIGKILL at random moments and in the middle of saves, of both kinds; then to the end."""
    output = tmp_path / "run"
    chance = random.Random(1)
    for in_save, background in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0)):
        pointer = output / "checkpoints" / "latest"
        begin = int(pointer.read_text()[5:]) if pointer.exists() else 0
        swept = set(in_writing(output))
        background_flag = f"checkpoint.asynchronous={'true' if background else 'false'}"
        job = start_ranks(tmp_path, words(whole, output, OFTEN, background_flag), processes=2)
        if in_save:
            wait_until(partial(_new_save, output, swept), job.text)
        else:
            wait_until(partial(_has_done, job, begin + chance.randint(1, 2)), job.text)
            time.sleep(chance.uniform(0, 0.1))
        job.kill()
        assert job.wait() == [-signal.SIGKILL] * 2, job.text()
        assert in_writing(output) or not in_save
        wait_until(partial(_has_nothing_left, job), job.text, timeout=5)

    last = run_ranks(tmp_path, words(whole, output), processes=2)

    assert "going on from" in last.text()
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

    job = start_ranks(tmp_path, [*arguments, OFTEN], processes=2)
    wait_until(lambda: "step 4/" in job.text(), job.text)
    os.killpg(job.pids[1], signal.SIGTERM)
    begin = time.monotonic()
    assert job.wait() == [0, 0], job.text()
    assert time.monotonic() - begin < 30
    assert "because of signal SIGTERM: the same command goes on from" in job.text()
    stopped = steps_done(output)
    assert 4 <= stopped < STEPS
    assert (output / "checkpoints" / "latest").read_text() == f"step_{stopped:07d}\n"

    job = start_ranks(tmp_path, [*arguments, OFTEN, "checkpoint.asynchronous=true"], processes=2)
    wait_until(lambda: bool(in_writing(output)), job.text)
    job.kill(signal.SIGUSR1, ranks=[0])
    assert job.wait() == [0, 0], job.text()
    assert "because of signal SIGUSR1" in job.text()
    assert stopped < steps_done(output) < STEPS
    assert in_writing(output) == job.left_behind() == []

    run_ranks(tmp_path, arguments, processes=2)
    assert_same_end(output, whole)


def _cut_tensors(checkpoint: Path) -> str:
    file = checkpoint / "__1_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    return f"{file.name} has {size - 1} bytes instead of {size}"


def _lose_tensors(checkpoint: Path) -> str:
    (checkpoint / "__0_1.distcp").unlink()
    return "__0_1.distcp is missing"


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
    assert job.text().count("error: ") == 1
    assert f"No checkpoint in {output}/checkpoints can be used" in job.text()


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
    output, log = tmp_path / "run", tmp_path / "log"
    start = [*torchrun(2, "--max-restarts=1"), TRAIN, *words(whole, output, OFTEN)]
    with log.open("w") as file, started(start, stdout=file.fileno(), stderr=file.fileno()) as job:
        wait_until(lambda: "step 3/" in log.read_text(), log.read_text, timeout=200)
        os.kill(_worker(job.pid), signal.SIGKILL)
        wait_until(
            lambda: "step 5/" in log.read_text().partition("going on from")[2],
            log.read_text,
            timeout=200,
        )
        job.terminate()
        job.wait(60)

    assert "because of signal SIGTERM" in log.read_text()
    done = read_metrics(output)
    assert 5 <= len(done) < STEPS
    assert (output / "checkpoints" / "latest").read_text() == f"step_{len(done):07d}\n"
    losses = [[line["lm_loss"] for line in run] for run in (done, read_metrics(whole))]
    assert losses[0] == losses[1][: len(done)]


def _worker(launcher: int) -> int:
    """The process of rank 1 below a launcher."""
    for pid in descendants(launcher):
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError("There is no rank 1.")
