"""Programs that a tool starts end with it, and report nothing when it stops them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moiie_megatron.mcore.process_lifetime import run_child, start_child, stop_launcher
from tests.helpers.launch import ROOT, is_running
from tests.helpers.ranks import wait_until

STARTED = """
import time
from moiie_megatron.mcore.process_lifetime import start_child
print(start_child(["sleep", "60"]).pid, flush=True)
time.sleep(60)
"""
WAITED_FOR = """
from moiie_megatron.mcore.process_lifetime import run_child
run_child(["bash", "-c", "echo $$ >&2; sleep 60"])
"""
RANK = "trap 'sleep 0.2; touch saved; exit 0' TERM; touch up$1; while :; do sleep 0.05; done"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(
    ("program", "number"),
    [
        (STARTED, signal.SIGKILL),
        *((WAITED_FOR, number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
    ],
)
def test_a_child_ends_with_a_stopped_parent(program: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.send_signal(number)
    assert parent.returncode == -number
    wait_until(lambda: not is_running(child), lambda: "the child lives", timeout=5)


def test_what_a_child_prints() -> None:
    assert run_child(["echo", "a line"]) == "a line\n"
    with pytest.raises(subprocess.CalledProcessError):
        run_child(["false"])


@pytest.mark.parametrize(
    ("number", "saves"), [(signal.SIGTERM, True), (signal.SIGKILL, False)], ids=["term", "kill"]
)
def test_ranks_are_stopped_and_not_reported(
    number: signal.Signals, saves: bool, tmp_path: Path
) -> None:
    (tmp_path / "rank.sh").write_text(RANK)
    script = "bash rank.sh 0 & bash rank.sh 1 & wait -n; echo a rank has failed"
    launcher = start_child(["bash", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE)
    wait_until(lambda: len(list(tmp_path.glob("up*"))) == 2, lambda: "no ranks", 10)
    ranks = psutil.Process(launcher.pid).children()
    started = time.monotonic()

    stop_launcher(launcher, number, seconds=20)

    assert time.monotonic() - started < 10
    assert launcher.stdout is not None and launcher.stdout.read() == b""
    assert len(ranks) == 2 and not any(is_running(rank.pid) for rank in ranks)
    assert (tmp_path / "saved").exists() == saves


def test_a_child_without_ranks() -> None:
    child = start_child(["sleep", "60"])
    stop_launcher(child, signal.SIGTERM, seconds=20)
    assert child.returncode == -signal.SIGTERM
    stop_launcher(child, signal.SIGTERM, seconds=20)  # already over
