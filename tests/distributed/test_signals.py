"""Ctrl-C saves as SIGTERM does; a rank that waits for its peers ends on a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.helpers.launch import ROOT, TRAIN, command, environment
from tests.helpers.pause import Pause
from tests.helpers.ranks import start_ranks, wait_until
from tests.helpers.tiny_run import read_metrics, tiny_values, write_config
from tests.helpers.user_errors import assert_one_error

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]


def test_an_interrupt_saves_and_a_second_run_is_refused_meanwhile(
    tmp_path: Path, digits: Path
) -> None:
    """The interrupt reaches the workers that read samples as well, as from a terminal."""
    values = tiny_values(digits, tmp_path / "run")
    values["data"]["num_workers"] = 1
    config = write_config(tmp_path / "run.yaml", values)
    pause = Pause(tmp_path / "pause")
    job = start_ranks(tmp_path, [config], 1, pause.before_step(2), interpreter=sys.executable)
    pause.wait(1, job.text)
    second = start_ranks(tmp_path, [config], 1)
    assert second.wait() == [1]
    assert_one_error(second.text(), "output is", tmp_path / "run", job.pids[0], "remove")

    os.killpg(job.pids[0], signal.SIGINT)
    wait_until(lambda: "a second Ctrl-C" in job.text(), job.text)
    pause.release()

    assert job.wait() == [0], job.text()
    assert "Stopped after step 2 of 5 because of signal SIGINT" in job.text()
    assert "Traceback" not in job.text() and job.left_behind() == []
    assert len(read_metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_0000002\n"
    assert not list((tmp_path / "run").glob("*running*"))


def test_a_rank_that_waits_for_its_peers(tmp_path: Path, digits: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_values(digits, tmp_path / "run"))
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    meeting |= {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with subprocess.Popen(
        command(TRAIN, [config], interpreter=sys.executable),
        cwd=ROOT,
        env=environment() | meeting,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        # Its address is there, and the one of the other rank is missing.
        wait_until(lambda: store.num_keys() > 1, lambda: "it has not come to the store")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert out.splitlines()[-1] == "Stopped by SIGTERM."
    assert "Traceback" not in out
