"""Starts processes with one thread each, with a hard time limit, and leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "tools/train.py"


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


def torchrun(processes: int, *options: str) -> list[str]:
    """The start of a command on one node; torchrun finds a free port itself, without a race."""
    # The script, not the module: the module's start imports torch once more.
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*runner, "--local-addr=localhost", f"--nproc-per-node={processes}", *options]


def command(script: str, arguments: Sequence[str | Path], processes: int = 1) -> list[str]:
    """Start ``script`` (a path from the root) plainly, or with torchrun for several processes."""
    start = [sys.executable] if processes == 1 else torchrun(processes)
    return [*start, script, *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread per process, and nothing of a launcher that may run around the tests."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


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
    for group in {process.pid, *_groups_below(process.pid)}:
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


def _groups_below(root: int) -> set[int]:
    """Process groups of all descendants: torchrun's workers lead groups of their own."""
    children: dict[int, list[tuple[int, int]]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name in brackets: state, parent, process group.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append((int(entry.name), int(fields[2])))
    groups: set[int] = set()
    waiting = [root]
    while waiting:
        for pid, group in children.get(waiting.pop(), []):
            groups.add(group)
            waiting.append(pid)
    return groups
