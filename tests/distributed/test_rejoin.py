"""Two torchrun agents as two nodes: one is killed in mid-training, started again and taken back."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.joint_runs import SAVE_EVERY, STEPS, joint_values
from tests.helpers.launch import ROOT, TRAIN, environment, kill_group
from tests.helpers.pause import Pause
from tests.helpers.tiny_run import read_metrics, read_routing, write_config

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

TIMEOUT = 240


class Node:
    """An agent with one worker, at a loopback address of its own; a thing to start and kill."""

    def __init__(self, folder: Path, number: int, endpoint: str, words: Sequence[str]) -> None:
        self.log = folder / f"node{number}-{time.monotonic_ns()}.log"
        variables = {
            "NNODES": "2",
            "NPROC_PER_NODE": "1",
            "RDZV_ENDPOINT": endpoint,
            "LOCAL_ADDRESS": f"127.0.0.{number + 1}",
            "PYTHON": sys.executable,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "examples/torchrun.sh", *words],
                cwd=ROOT,
                env={**environment(), **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL for agent and worker at once, as when a node loses power."""
        kill_group(self.process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, deadline: float) -> None:
    """The first agent keeps the store that the others meet in: it must be there first."""
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("The first agent has not opened its store.")


def test_killed_agent_is_taken_back(tmp_path: Path, digits: Path, single: Path, pair: Path) -> None:
    output = tmp_path / "run"
    values = joint_values(
        digits,
        output,
        single / "seed",
        parallel={"expert": 2},
        checkpoint={"interval": SAVE_EVERY},
    )
    config = write_config(tmp_path / "run.yaml", values)
    pause, port = Pause(tmp_path / "pause"), _free_port()
    words = ["tests/helpers/hooked.py", pause.before_step(SAVE_EVERY + 2), TRAIN, str(config)]
    endpoint = f"127.0.0.1:{port}"
    deadline = time.monotonic() + TIMEOUT
    nodes = [Node(tmp_path, 0, endpoint, words)]
    try:
        _wait_for_port(port, deadline)
        nodes.append(Node(tmp_path, 1, endpoint, words))
        pause.wait(2, nodes[0].log.read_text)
        nodes[1].kill()
        assert len(read_metrics(output)) == SAVE_EVERY + 1

        pause.release()
        nodes.append(Node(tmp_path, 1, endpoint, words))

        codes = [node.process.wait(deadline - time.monotonic()) for node in (nodes[0], nodes[2])]
    finally:
        for node in nodes:
            node.kill()

    printed = "".join(node.log.read_text() for node in nodes)
    assert codes == [0, 0], printed[-6000:]
    checkpoint = output / "checkpoints" / f"step_{SAVE_EVERY:07d}"
    assert f"going on from {checkpoint}" in printed
    steps, undisturbed = read_metrics(output), read_metrics(pair / "ep2")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for key in ("lm_loss", "grad_norm", "aux_vision", "aux_text", "tokens"):
        assert [line[key] for line in steps] == [line[key] for line in undisturbed], key
    assert read_routing(output) == read_routing(pair / "ep2")
