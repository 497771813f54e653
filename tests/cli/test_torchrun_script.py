"""examples/torchrun.sh: what it hands to torchrun, and what it does with signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, environment, kill_group

SCRIPT = ["bash", str(ROOT / "examples" / "torchrun.sh")]
TIMEOUT = 60
NAMES = ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "RDZV_ENDPOINT", "RDZV_ID", "MAX_RESTARTS")
NAMES += ("JOIN_TIMEOUT", "LOCAL_ADDRESS", "NUMA_BINDING")

WORKER = """
import os, pathlib, signal, sys, time

def finish(*_):
    time.sleep(1)
    pathlib.Path("saved" + os.environ["LOCAL_RANK"]).touch()
    sys.exit()

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, finish)
pathlib.Path("up" + os.environ["LOCAL_RANK"]).touch()
while True:
    time.sleep(0.1)
"""


def _environment(python: str | Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in environment().items() if name not in NAMES}
    return {**kept, "PYTHON": str(python), **variables}


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """In place of Python: prints its arguments and the variables that matter."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"\n')
    program.chmod(0o755)
    return program


def _printed(echo: Path, **variables: str) -> str:
    result = subprocess.run(
        [*SCRIPT, "train.py", "a=b"],
        env=_environment(echo, **variables),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("-m torch.distributed.run ")
    assert result.stdout.endswith(" train.py a=b 1\n")
    return result.stdout


def test_one_node(echo: Path) -> None:
    printed = _printed(echo)
    assert " --nproc-per-node gpu --standalone --local-addr localhost --max-restarts 0 " in printed
    assert " --max-restarts 2 " in _printed(echo, MAX_RESTARTS="2", NNODES="1")


def test_several_nodes(echo: Path) -> None:
    address = {"NNODES": "4", "NPROC_PER_NODE": "8", "RDZV_ENDPOINT": "node0:29500"}

    free = _printed(echo, **address, RDZV_ID="job7", LOCAL_ADDRESS="10.0.0.1")
    numbered = _printed(echo, **address, NODE_RANK="3")

    for words in (
        "--nproc-per-node 8 --nnodes 4 --rdzv-endpoint node0:29500 --rdzv-id job7",
        "--rdzv-backend c10d --rdzv-conf join_timeout=1800,",
        "--max-restarts 3 --local-addr 10.0.0.1",
    ):
        assert f" {words}" in free
    assert " --rdzv-id moiie --rdzv-backend static --node-rank 3 --max-restarts 3 " in numbered


@pytest.fixture
def gpu_node(tmp_path: Path) -> dict[str, str]:
    """Variables of a node with GPUs and numactl, on which nobody has set anything."""
    for name in ("nvidia-smi", "numactl"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def _settings(variables: dict[str, str]) -> list[str]:
    """The environment that the processes get, in words."""
    names = ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF")
    words = ["bash", "-c", 'source "$0" && env', str(ROOT / "examples" / "environment.sh")]
    kept = {k: v for k, v in os.environ.items() if k not in names}
    env = {**kept, "PYTHON": "python", **variables}
    lines = subprocess.run(words, env=env, capture_output=True, text=True, timeout=TIMEOUT).stdout
    return sorted(line for line in lines.splitlines() if line.partition("=")[0] in names)


def test_the_environment_of_a_node_with_gpus(gpu_node: dict[str, str]) -> None:
    settings = [
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
        "OMP_NUM_THREADS=8",
        "PYTORCH_ALLOC_CONF=expandable_segments:True",
    ]
    assert _settings(gpu_node) == settings
    settings[1] = "OMP_NUM_THREADS=2"
    assert _settings(gpu_node | {"OMP_NUM_THREADS": "2"}) == settings
    older = gpu_node | {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    assert len(_settings(older)) == 2  # torch would read the newer name first


def test_one_thread_where_there_is_no_gpu(tmp_path: Path, gpu_node: dict[str, str]) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert "OMP_NUM_THREADS=1" in _settings(gpu_node)


def test_processes_are_bound_to_cpus_next_to_their_gpus(
    echo: Path, tmp_path: Path, gpu_node: dict[str, str]
) -> None:
    assert " --nproc-per-node gpu --numa-binding node --standalone" in _printed(echo, **gpu_node)
    assert "--numa-binding socket" in _printed(echo, **gpu_node, NUMA_BINDING="socket")
    assert "--numa-binding" not in _printed(echo, **gpu_node, NUMA_BINDING="none")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert "--numa-binding" not in _printed(echo, **gpu_node)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Two workers that know SIGUSR1 alone and end with 0 after it, and not at once."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with subprocess.Popen(
        [*SCRIPT, str(worker)],
        env=_environment(sys.executable, NPROC_PER_NODE="2"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            kill_group(process)


@pytest.mark.slow
@pytest.mark.parametrize("to_everything", [False, True])
def test_signals_reach_the_workers(
    job: subprocess.Popen[str], to_everything: bool, tmp_path: Path
) -> None:
    """SIGTERM to the script alone; SIGUSR1 to the script and torchrun, as some cluster managers
    signal every process of a job (workers lead groups of their own)."""
    deadline = time.monotonic() + TIMEOUT
    while len(list(tmp_path.glob("up*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    if to_everything:
        os.killpg(job.pid, signal.SIGUSR1)
    else:
        os.kill(job.pid, signal.SIGTERM)

    printed = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == 0, printed
    assert len(list(tmp_path.glob("saved*"))) == 2


@pytest.mark.slow
def test_an_interrupt_saves_and_ends_scripts(job: subprocess.Popen[str], tmp_path: Path) -> None:
    """As from a terminal: to the script's process group, which the workers are not in."""
    deadline = time.monotonic() + TIMEOUT
    while len(list(tmp_path.glob("up*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    os.killpg(job.pid, signal.SIGINT)

    printed = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == 130
    assert len(list(tmp_path.glob("saved*"))) == 2
    assert printed.splitlines()[-1].startswith("Saving after this step")
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_failed_worker_fails_the_script(tmp_path: Path) -> None:
    result = subprocess.run(
        [*SCRIPT, "--no-python", "bash", "-c", "exit 3"],
        env=_environment(sys.executable, NPROC_PER_NODE="1"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 1
    assert "exitcode  : 3" in result.stderr
