"""Many starts of multi-process training for the price of one: a server that forks the ranks.

Starting a process that imports torch and Megatron takes far longer than a tiny run.  The server
(this file as a script) imports them once; each rank is a fork of it that runs ``tools/train.py``
as torchrun would have started it, in a session of its own.  Tests send signals to the ranks
themselves.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.launch import ROOT, started


@dataclass(frozen=True)
class Job:
    """Running ranks of one start."""

    pids: list[int]
    output: Path

    def text(self) -> str:
        """What the ranks have printed so far, errors included."""
        return self.output.read_text()

    def kill(self, number: int = signal.SIGKILL, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks (None: to all), not to what they have started."""
        for rank, pid in enumerate(self.pids):
            if ranks is None or rank in ranks:
                os.kill(pid, number)

    def left_behind(self) -> list[int]:
        """Processes that these ranks have started, directly or not, and that still live."""
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _session(entry) in self.pids
        ]


class WarmRanks:
    """The tests' side of the server."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._count = 0

    def start(
        self, arguments: Sequence[str | Path], processes: int, hook: str | None = None
    ) -> Job:
        """Start ``tools/train.py`` on so many ranks.

        Args:
            hook: ``module:function`` that every rank calls with its number before.
        """
        self._count += 1
        output = self._folder / f"job{self._count}.log"
        question = {"start": [str(a) for a in arguments], "n": processes, "log": str(output)}
        return Job(self._ask(question | {"hook": hook}), output)

    def wait(self, job: Job, timeout: float = 200) -> list[int]:
        """Exit codes of the ranks (negative: the signal that ended them); none of them lives on.

        Ranks that take longer than ``timeout`` seconds are killed.
        """
        return self._ask({"wait": job.pids, "timeout": timeout})

    def run(self, arguments: Sequence[str | Path], processes: int, timeout: float = 200) -> Job:
        """Start ranks and see all of them end with 0."""
        job = self.start(arguments, processes)
        assert self.wait(job, timeout) == [0] * processes, job.text()[-4000:]
        return job

    def _ask(self, question: dict[str, object]) -> list[int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: list[int] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def warm_ranks(folder: Path) -> Iterator[WarmRanks]:
    """A server for as long as the context lasts; its jobs write their output into ``folder``."""
    words = [sys.executable, "-m", "tests.helpers.warm_ranks"]
    with started(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield WarmRanks(process, folder)


def wait_until(
    condition: Callable[[], object], job: Job, timeout: float = 120, pause: float = 0.002
) -> None:
    """Look until something is the case, or fail with what the job has printed."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, job.text()[-4000:]
        time.sleep(pause)


def in_writing(output: Path) -> list[Path]:
    """Checkpoints of a run that do not have their name yet and hold something."""
    found = (output / "checkpoints").glob("*.writing")
    return [folder for folder in found if any(folder.iterdir())]


def _session(entry: Path) -> int | None:
    """The session that a process belongs to, by its folder in /proc; None for a dead one."""
    try:
        # After the name in brackets: state, parent, process group, session.
        state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(session)


def _start(arguments: list[str], n: int, log: str, hook: str | None, port: int) -> list[int]:
    pids = []
    for rank in range(n):
        pid = os.fork()
        if not pid:
            _be_rank(arguments, rank, n, port, log, hook)
        pids.append(pid)
    return pids


def _be_rank(
    arguments: list[str], rank: int, n: int, port: int, log: str, hook: str | None
) -> None:
    """Never returns."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.argv = ["tools/train.py", *arguments]
    code = 0
    try:
        if hook is not None:
            module, _, function = hook.partition(":")
            getattr(importlib.import_module(module), function)(rank)
        runpy.run_path(str(ROOT / "tools/train.py"), run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # What a normal exit waits for: children of multiprocessing.
    from multiprocessing.util import _exit_function

    _exit_function()
    os._exit(code)


def _wait(pids: list[int], timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in (pid for pid in pids if pid not in codes):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def main() -> None:
    from torch.distributed import TCPStore

    import moiie_megatron.training.loop  # noqa: F401  what is worth sharing

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            # As torchrun's agent, this process keeps the store in which the ranks meet.
            store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            answer = _start(
                *(question[key] for key in ("start", "n", "log", "hook")), port=store.port
            )
        else:
            answer = _wait(question["wait"], question["timeout"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
