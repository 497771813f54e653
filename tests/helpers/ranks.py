"""Ranks without torchrun around them: tests send signals to the training processes themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from tests.helpers.launch import ROOT, TRAIN, command, environment, fork_of, kill_group


@dataclass(frozen=True)
class Job:
    """Running ranks of one start.

    Attributes:
        pids: The ranks, each the leader of its session and process group.
    """

    processes: list[subprocess.Popen[bytes]]
    pids: list[int]
    output: Path
    store: TCPStore  # where the ranks meet: kept here as torchrun's agent keeps it

    def text(self) -> str:
        """What the ranks have printed so far, errors included."""
        return self.output.read_text()

    def kill(self, number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks (None: to all), not to what they have started."""
        for rank, pid in enumerate(self.pids):
            if ranks is None or rank in ranks:
                os.kill(pid, number)

    def wait(self, timeout: float = 200) -> list[int]:
        """Exit codes of the ranks (negative: the signal that ended them); none of them lives on.

        Ranks that take longer than ``timeout`` seconds are killed.
        """
        deadline = time.monotonic() + timeout
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                kill_group(process)
                codes.append(process.wait())
        return codes

    def left_behind(self) -> list[int]:
        """Processes that these ranks have started, directly or not, and that still live."""
        found = []
        for process in psutil.process_iter(["status"]):
            with suppress(ProcessLookupError):
                is_ours = os.getsid(process.pid) in self.pids
                if is_ours and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found


def start_ranks(
    folder: Path,
    arguments: Sequence[str | Path],
    processes: int,
    hook: str | None = None,
    interpreter: str | None = None,
) -> Job:
    """Start ``tools/train.py`` on so many ranks; they print to a file in ``folder``.

    Args:
        hook: Called in every rank before the script starts (``hooked.py``).
        interpreter: What to start with; None is ``python()``.
    """
    # Without waiting for the others: this process is none of the ranks.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    output = folder / f"ranks-{time.monotonic_ns()}.log"
    words = command(TRAIN, arguments, hook=hook, interpreter=interpreter)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    meeting |= {"WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with output.open("ab") as log:
        started = [
            subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment() | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for rank in range(processes)
        ]
    pids = [process.pid if interpreter else fork_of(process) for process in started]
    return Job(started, pids, output, store)


def run_ranks(
    folder: Path, arguments: Sequence[str | Path], processes: int, timeout: float = 200
) -> Job:
    """Start ranks and see all of them end with 0."""
    job = start_ranks(folder, arguments, processes)
    assert job.wait(timeout) == [0] * processes, job.text()[-4000:]
    return job


def wait_until(
    condition: Callable[[], object],
    text: Callable[[], str],
    timeout: float = 120,
    pause: float = 0.002,
) -> None:
    """Look until something is the case, or fail with the end of what has been printed."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, text()[-4000:]
        time.sleep(pause)


def in_writing(output: Path) -> list[Path]:
    """Checkpoints of a run that do not have their name yet and hold something."""
    found = (output / "checkpoints").glob("step_*.writing")
    return [folder for folder in found if any(folder.iterdir())]
