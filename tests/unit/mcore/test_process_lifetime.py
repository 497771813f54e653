"""Forked processes end with the one that forked them, and data workers heed only it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")

ROOT = Path(__file__).resolve().parents[3]
FAMILY = """
import multiprocessing, os, time
from moiie_megatron.mcore.process_lifetime import kill_children_on_exit

kill_children_on_exit()
kill_children_on_exit()

def child():
    grandchild = os.fork()
    if grandchild:
        print(os.getpid(), grandchild, flush=True)
    time.sleep(60)

multiprocessing.get_context("fork").Process(target=child).start()
time.sleep(60)
"""
WORKER = """
import os, signal, sys, time
from moiie_megatron.data.stream.worker import ignore_group_signals

pid = os.fork()
if not pid:
    ignore_group_signals(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
sys.stdin.readline()
print(os.waitpid(pid, os.WNOHANG)[0], flush=True)
os.kill(pid, signal.SIGTERM)
print(os.waitpid(pid, 0)[1], flush=True)
"""


def _start(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _lives(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nobody_outlives_a_killed_process() -> None:
    with _start(FAMILY) as process:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        assert len(children) == 2 and all(map(_lives, children))
        process.kill()
        deadline = time.monotonic() + 10
        while any(map(_lives, children)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(_lives, children))


def test_a_worker_ends_when_its_parent_says_so_and_only_then() -> None:
    with _start(WORKER) as process:
        assert process.stdin is not None and process.stdout is not None
        worker = int(process.stdout.readline())
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
        time.sleep(0.2)
        assert _lives(worker)
        answer, _ = process.communicate("go\n", timeout=20)
        assert answer.split() == ["0", "0"]  # not ended before, then with code 0
