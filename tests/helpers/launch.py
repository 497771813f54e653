"""Starts processes with one thread each, with a hard time limit, and leaves none behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.fork_server import ForkServer
from tests.te.standin.install import SITE as TE_SITE
from tests.te.standin.install import VARIABLE as TE_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "tools/train.py"
FORKS = "MOIIE_TEST_FORKS_DIRECTORY"  # the variable that names the fork server's directory


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    def check(self) -> Finished:
        """This value, or an AssertionError with the end of what was printed."""
        assert self.code == 0, (
            f"exit code {self.code}\n{self.stdout[-2000:]}\n{self.stderr[-6000:]}"
        )
        return self


def python() -> str:
    """What to start scripts with: Python, or what asks the fork server (``MOIIE_TEST_FORKS=1``).

    Tests that kill processes, send them signals or look at parents and children start
    ``sys.executable`` instead.
    """
    if FORKS not in os.environ:
        return sys.executable
    return str(_started_server(Path(os.environ[FORKS])).executable)


@functools.cache
def _started_server(directory: Path) -> ForkServer:
    server = ForkServer(directory)
    server.start(environment())
    return server


def torchrun(processes: int, *options: str, interpreter: str | None = None) -> list[str]:
    """The start of a command on one node; torchrun finds a free port itself, without a race.

    Args:
        interpreter: What runs torchrun and, through it, the ranks; None is ``python()``.
    """
    runner = [interpreter or python(), "-m", "torch.distributed.run", "--standalone"]
    return [*runner, "--local-addr=localhost", f"--nproc-per-node={processes}", *options]


def command(
    script: str,
    arguments: Sequence[str | Path],
    processes: int = 1,
    *,
    hook: str | None = None,
    interpreter: str | None = None,
) -> list[str]:
    """Start ``script`` (a path from the root) plainly, or with torchrun for several processes.

    Args:
        hook: Called in every process before the script starts (``hooked.py``).
        interpreter: See ``torchrun``.
    """
    start = [interpreter or python()]
    if processes > 1:
        start = torchrun(processes, interpreter=interpreter)
    if hook is not None:
        start += ["tests/helpers/hooked.py", hook]
    return [*start, script, *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread per process, and nothing of a launcher that may run around the tests.

    Processes see Transformer Engine where this one does (``tests/te``).
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if TE_VARIABLE in os.environ:
        path = [str(TE_SITE), *path]
    path = os.pathsep.join(dict.fromkeys(path))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@contextmanager
def started(words: Sequence[str], **options: int) -> Iterator[subprocess.Popen[str]]:
    """A running command in its own process group; the whole group is killed at the end."""
    with subprocess.Popen(
        list(words),
        cwd=ROOT,
        env=environment(),
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    ) as process:
        try:
            yield process
        finally:
            kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a process and everything that it has started."""
    for group in {process.pid, *descendants(process.pid).values()}:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def run(words: Sequence[str], timeout: float) -> Finished:
    """Run a command to its end.

    Raises:
        subprocess.TimeoutExpired: It took longer than ``timeout`` seconds; it is gone then.
    """
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=timeout)
        return Finished(process.returncode, out, err)


def descendants(root: int) -> dict[int, int]:
    """All processes that a process has started, directly or not, and their process groups.

    Older ones come first.  torchrun's workers lead groups of their own, and forks of the fork
    server count as started by their clients.
    """
    children: dict[int, list[tuple[int, int]]] = {}
    clients = _clients()
    for process in psutil.process_iter(["ppid"]):
        with suppress(ProcessLookupError):
            parent = clients.get(process.pid) or process.info["ppid"]
            children.setdefault(parent, []).append((process.pid, os.getpgid(process.pid)))
    found: dict[int, int] = {}
    waiting = [root]
    while waiting:
        for pid, group in children.get(waiting.pop(), []):
            if pid not in found:
                found[pid] = group
                waiting.append(pid)
    return found


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended (a zombie has)."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def fork_of(process: subprocess.Popen[bytes], timeout: float = 60) -> int:
    """The process that runs what was started with ``python()``: itself, or its fork."""
    if FORKS not in os.environ:
        return process.pid
    deadline = time.monotonic() + timeout  # the server may still be importing
    while process.poll() is None and time.monotonic() < deadline:
        for fork, client in _clients().items():
            if client == process.pid:
                return fork
        time.sleep(0.002)
    return process.pid


def _clients() -> dict[int, int]:
    """The clients of the fork server's forks, by process id."""
    found = {}
    for link in Path(os.environ[FORKS]).glob("forks/*") if FORKS in os.environ else ():
        with suppress(FileNotFoundError):  # it has just ended
            found[int(link.name)] = int(link.readlink().name)
    return found
