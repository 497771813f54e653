"""One run at a time writes to an output directory, and one process evaluates its checkpoints.

The first process of a run holds the file ``OUTPUT/running.json``, which says where it runs and is
written anew every few seconds.  A run that was killed leaves the file behind: on its own machine
the next one sees that the process is gone, on another one that the file does not change any more.
No lock of the operating system is used: network file systems do not all have them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from moiie_megatron.mcore.parallel import ParallelContext

LOGGER: Final = logging.getLogger(__name__)
LOCK_FILE: Final = "running.json"
BEAT: Final = 5.0  # seconds between two writes
WATCH: Final = 30.0  # seconds in which a run on another machine must have written
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES: Final = Path("/proc/self/ns/pid")


@contextmanager
def locked_output(output: str | Path, context: ParallelContext) -> Iterator[None]:
    """In the block no other run may write to the directory; rank 0 holds the lock.

    Raises:
        UserError: Another run writes there, or the directory cannot be written.
    """
    if context.rank != 0:
        yield
        return
    lock = OutputLock(Path(output))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


class OutputLock:
    """The lock of a directory.

    Args:
        beat, watch: Seconds (``BEAT``, ``WATCH``).
        name: The file.
        refusal: What who comes second is told, between the directory and the time.
    """

    def __init__(
        self,
        output: Path,
        beat: float = BEAT,
        watch: float = WATCH,
        *,
        name: str = LOCK_FILE,
        refusal: str = ", where a run has been writing since",
    ) -> None:
        self._file = output / name
        self._refused = refusal
        self._beat, self._watch = beat, watch
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="output lock", daemon=True)
        self._ours = this_process()

    def acquire(self) -> None:
        """Take the lock; one that a killed run has left is taken over.

        Raises:
            UserError: Another run holds it, or the directory cannot be written.
        """
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = self._holder()
                if self._is_alive(holder):
                    raise UserError(self._refusal(holder))
                self._file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"output is {self._file.parent}, which cannot be written ({error}): name another "
                "directory, make room there, or change its permissions."
            ) from error
        self._thread.start()

    def release(self) -> None:
        """Give the lock back."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        with suppress(OSError):
            if _who(self._holder()) == _who(self._ours):
                self._file.unlink()

    def _create(self) -> bool:
        """Make the file, with its content at once, unless it is there."""
        beside = self._file.with_name(f".{self._file.name}.{self._ours['host']}.{os.getpid()}")
        beside.write_text(self._text())
        try:
            os.link(beside, self._file)  # one of several succeeds, on network file systems too
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            return self._create_exclusively()  # there are no hard links
        finally:
            beside.unlink(missing_ok=True)
        return True

    def _create_exclusively(self) -> bool:
        try:
            with self._file.open("x") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _text(self) -> str:
        # Always of the same length, so that it can be overwritten in place.
        return json.dumps(self._ours | {"alive": f"{time.time():.3f}"}) + "\n"

    def _holder(self) -> dict[str, Any]:
        """What the file says; empty where it is gone or cannot be read."""
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        if _who(holder) == _who(self._ours) or not self._file.exists():
            return False
        if holder.get("machine") == self._ours["machine"]:
            return is_running(int(holder["pid"]), holder.get("ticks"))
        LOGGER.info(
            "Waiting at most %.0f s to see whether %s on %s still runs.",
            self._watch,
            holder.get("pid", "a process"),
            holder.get("host", "another machine"),
        )
        deadline = time.monotonic() + self._watch
        while time.monotonic() < deadline:
            time.sleep(self._beat / 5)
            now = self._holder()
            if now != holder:
                return bool(now)
        return False

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"output is {self._file.parent}{self._refused} "
            f"{holder.get('since')} (process {holder.get('pid')} on {holder.get('host')}): stop it "
            f"or name another directory; if it is gone, remove {self._file}."
        )

    def _write_on(self) -> None:
        while not self._over.wait(self._beat):
            # Not anew: on a full disk nothing would be left of it.
            with suppress(OSError), self._file.open("r+") as file:
                file.write(self._text())


def this_process() -> dict[str, Any]:
    """Where this process runs: host, process id, and since when.

    ``machine`` is equal for processes that see each other's process ids: not in two containers,
    nor after the machine was started again.  ``ticks`` tells two processes of one id apart.
    """
    machine = platform.node()
    with suppress(OSError):
        machine = f"{_BOOT.read_text().strip()} {os.readlink(_PROCESSES)}"
    return {
        "host": platform.node(),
        "machine": machine,
        "pid": os.getpid(),
        "ticks": _start(os.getpid()),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def is_running(pid: int, ticks: int | None) -> bool:
    """Whether a process of this machine is there, has not ended, and began at ``ticks``."""
    if not psutil.pid_exists(pid):
        return False
    return _start(pid) in (ticks, None) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _start(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None where that is not known.

    Unlike the time of day it stays the same when the clock is set.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _who(holder: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(holder.get(name) for name in ("machine", "pid", "ticks"))
