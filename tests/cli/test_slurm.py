"""examples/slurm with stand-ins for Slurm's commands: command lines, signals, requeues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, environment

TIMEOUT = 60
PATHS = ("LLM", "VISION", "STAGE1_RECORDS", "STAGE1_IMAGES", "STAGE2_RECORDS", "STAGE2_IMAGES")
UNSET = ("CONTAINER", "CONTAINER_MOUNTS", "MAX_REQUEUES", "NPROC_PER_NODE", "BACKBONE", "CONFIG")

# Notes its arguments; a call ends with the next code, or with 0 after SIGUSR1 where that is "wait".
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time

name, folder = pathlib.Path(sys.argv[0]).name, pathlib.Path({folder!r})
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
names = ("NNODES", "NPROC_PER_NODE", "RDZV_ENDPOINT", "RDZV_ID", "NODE_RANK", "PYTHON", "BACKBONE")
call = {{"name": name, "arguments": sys.argv[1:], "cwd": os.getcwd()}}
call["variables"] = {{key: os.environ.get(key) for key in names}}
earlier = (folder / "calls").read_text() if (folder / "calls").exists() else ""
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(call) + "\\n")
if sys.argv[1:2] == ["show"]:
    print("gpu07\\ngpu08")
if name == "sbatch":
    print("41" if not earlier else "42;cluster")
if name == "srun":
    done = sum(json.loads(line)["name"] == "srun" for line in earlier.splitlines())
    code = json.loads((folder / "codes").read_text())[done]
    if code == "wait":
        time.sleep(30)
    sys.exit(code)
"""


@dataclass(frozen=True)
class Slurm:
    """A folder with srun, sbatch and scontrol, and what they were called with."""

    folder: Path

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in environment().items() if name not in UNSET}
        job = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": "/env/bin/python",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "gpu[07-08]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "96",
            "SLURM_GPUS_ON_NODE": "8",
            "OUTPUT": "/runs/one",
            **{name: f"/{name.lower()}" for name in PATHS},
        }
        return {**kept, **job, **variables}

    def start(
        self, script: str, *arguments: str, codes: list[int | str], **variables: str
    ) -> subprocess.Popen[str]:
        (self.folder / "codes").write_text(json.dumps(codes))
        # A copy in another folder, as Slurm runs it.
        copy = self.folder / "slurm_script"
        copy.write_text((ROOT / "examples" / "slurm" / script).read_text())
        return subprocess.Popen(
            ["bash", str(copy), *arguments],
            env=self.environment(**variables),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, script: str, *arguments: str, codes: list[int | str], **variables: str
    ) -> tuple[int, str]:
        with self.start(script, *arguments, codes=codes, **variables) as process:
            err = process.communicate(timeout=TIMEOUT)[1]
        return process.returncode, err

    def calls(self, *names: str) -> list[dict]:
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] in names]

    @property
    def requeued(self) -> bool:
        return ["requeue", "123456"] in [call["arguments"] for call in self.calls("scontrol")]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    (tmp_path / "bin").mkdir()
    for name in ("srun", "sbatch", "scontrol"):
        program = tmp_path / "bin" / name
        program.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
        program.chmod(0o755)
    return Slurm(tmp_path)


def test_a_finished_run_ends_the_job(slurm: Slurm) -> None:
    assert slurm.run("stage2.sbatch", "train.seed=2", codes=[0, 0], BACKBONE="phi3") == (0, "")

    train, ask = slurm.calls("srun")
    config = ["examples/configs/phi3-stage2.yaml", "train.seed=2"]
    common = ["--ntasks-per-node=1", "--cpus-per-task=96", "--cpu-bind=none"]
    start = ["bash", f"{ROOT}/examples/torchrun.sh", f"{ROOT}/tools/train.py"]
    assert train["arguments"] == [
        *common,
        "--nodes=2",
        "--kill-on-bad-exit=1",
        *start,
        *config,
    ]
    assert train["cwd"] == str(ROOT)
    assert train["variables"] == {
        "NNODES": "2",
        "NPROC_PER_NODE": "8",
        "RDZV_ENDPOINT": "gpu07:23456",
        "RDZV_ID": "123456",
        "NODE_RANK": None,
        "PYTHON": "/env/bin/python",
        "BACKBONE": "phi3",
    }
    assert ask["arguments"][:4] == [*common, "--nodes=1"]
    assert ask["arguments"][-4:] == [f"{ROOT}/tools/train.py", *config, "--is-done"]
    assert not slurm.requeued


def test_what_srun_starts_runs(slurm: Slurm, tmp_path: Path) -> None:
    """The commands behind srun's options, with a Python that prints its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    slurm.run("stage1.sbatch", codes=[0, 0])

    printed = []
    for call in slurm.calls("srun"):
        command = call["arguments"][call["arguments"].index("bash") :]
        variables = {name: value for name, value in call["variables"].items() if value}
        printed.append(
            subprocess.run(
                command,
                env=slurm.environment(**{**variables, "PYTHON": str(python)}),
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=True,
            ).stdout
        )

    words = f"{ROOT}/tools/train.py examples/configs/llama3-stage1.yaml"
    assert printed[0].startswith("-m torch.distributed.run --nproc-per-node 8 --nnodes 2 ")
    assert " --rdzv-endpoint gpu07:23456 --rdzv-id 123456 --rdzv-backend c10d " in printed[0]
    assert printed[0].endswith(f" {words}\n")
    assert printed[1] == f"{words} --is-done\n"


def test_a_container(slurm: Slurm) -> None:
    slurm.run(
        "stage2.sbatch",
        codes=[0, 0],
        CONTAINER="/images/moiie.sqsh",
        CONTAINER_MOUNTS="/data:/data:ro,/runs:/runs",
        CONFIG="examples/ablations/vanilla.yaml",
    )

    for call in slurm.calls("srun"):
        assert call["arguments"][3:6] == [
            "--container-image=/images/moiie.sqsh",
            f"--container-mounts={ROOT}:{ROOT},/data:/data:ro,/runs:/runs",
            f"--container-workdir={ROOT}",
        ]
        assert call["variables"]["PYTHON"] == "python"
        assert "examples/ablations/vanilla.yaml" in call["arguments"]


def test_an_unfinished_run_goes_back_into_the_queue(slurm: Slurm) -> None:
    assert slurm.run("stage1.sbatch", codes=[0, 3]) == (0, "")
    assert slurm.requeued


@pytest.mark.parametrize(
    ("codes", "message"),
    [([7], "Training failed with code 7.\n"), ([0, 1], "")],
    ids=["training", "asking"],
)
def test_a_failed_run_does_not(slurm: Slurm, codes: list[int | str], message: str) -> None:
    assert slurm.run("stage1.sbatch", codes=codes) == (codes[-1], message)
    assert len(slurm.calls("srun")) == len(codes)
    assert not slurm.requeued


def test_the_time_is_over(slurm: Slurm) -> None:
    """SIGUSR1 to the batch script reaches srun; then there is no time left for asking."""
    with slurm.start("stage1.sbatch", codes=["wait"]) as process:
        deadline = time.monotonic() + TIMEOUT
        while not slurm.calls("srun"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.communicate(timeout=TIMEOUT)[1] == ""
    assert process.returncode == 0
    assert len(slurm.calls("srun")) == 1
    assert slurm.requeued


def test_requeues_have_an_end(slurm: Slurm) -> None:
    times = {"SLURM_RESTART_COUNT": "5", "MAX_REQUEUES": "5"}
    assert slurm.run("stage1.sbatch", codes=[0, 3], **times) == (
        1,
        "The run has not come to its end after 5 requeues.\n",
    )
    assert not slurm.requeued


def test_a_missing_path_is_one_sentence(slurm: Slurm) -> None:
    code, err = slurm.run("stage1.sbatch", codes=[], STAGE1_RECORDS="")
    assert code == 1
    assert (
        err
        == "error: STAGE1_RECORDS is not set: see examples/recipe.sh for the variables of a run.\n"
    )
    assert slurm.calls("srun") == []


@pytest.mark.parametrize("nodes", ["", "8"])
def test_both_stages(slurm: Slurm, nodes: str) -> None:
    result = subprocess.run(
        ["bash", "examples/slurm/submit.sh", "train.seed=2"],
        env=slurm.environment(NODES=nodes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )

    assert (result.returncode, result.stderr) == (0, "")
    first, second = (call["arguments"] for call in slurm.calls("sbatch"))
    options = ["--parsable", *(["--nodes=8"] if nodes else [])]
    assert first == [*options, "examples/slurm/stage1.sbatch", "train.seed=2"]
    assert second == [
        *options,
        "--dependency=afterok:41",
        "--kill-on-invalid-dep=yes",
        "examples/slurm/stage2.sbatch",
        "train.seed=2",
    ]
    assert result.stdout == "stage 1: job 41; stage 2: job 42, when that has come to its end\n"


@pytest.mark.parametrize("script", ["stage1.sbatch", "stage2.sbatch"])
def test_options_for_slurm(script: str) -> None:
    lines = (ROOT / "examples" / "slurm" / script).read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert options >= {
        "--requeue",
        "--signal=B:USR1@600",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
    }
    # Slurm stops reading options at the first command.
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
