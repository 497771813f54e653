"""Worker processes: their signals, what they send, and what becomes of one that sends nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch.utils.data import DataLoader

from moiie_megatron.data.stream.flat_item import FlatItem, flatten
from moiie_megatron.utils.errors import UserError

# Sent to all processes of a job that should save and exit (training/stop.py).
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
POLL_INTERVAL: Final = 1.0  # seconds; ``timeout`` of the loader
# Seconds from a request to stop until a run no longer waits for its samples.  Launchers and
# cluster managers kill a job 30 seconds after their signal.
PATIENCE: Final = 20.0


def ignore_group_signals(worker_id: int) -> None:
    """``worker_init_fn``: exit on SIGTERM from the training process, ignore it from any other.

    Launchers and cluster managers signal whole process groups, but the running step still needs
    its samples.  torch's own handler would end the worker, and with it the run.
    """
    del worker_id
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def flatten_in_worker(item: Any) -> FlatItem | UserError:
    """``collate_fn``: the item for the main process, or why it cannot be sent."""
    try:
        return flatten(item)
    except (RuntimeError, OSError) as error:
        return UserError(
            f"A worker process has no shared memory for its samples ({_first_line(error)}): make "
            "/dev/shm larger (docker run --shm-size), or lower data.num_workers."
        )


def receive(loader: DataLoader[Any], is_stopping: Callable[[], bool]) -> Iterator[Any]:
    """The items that the workers read.

    Args:
        loader: Has workers, ``flatten_in_worker`` and the timeout ``POLL_INTERVAL``.
        is_stopping: Whether the run should stop.

    Raises:
        UserError: While iterating: a worker has ended, or sends nothing for ``PATIENCE`` seconds
            after the run should stop.
    """
    before = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    restore_sigchld(before)
    while True:
        try:
            item = _wait(items, is_stopping)
        except StopIteration:
            return
        yield item.restore() if isinstance(item, FlatItem) else item


def restore_sigchld(before: Any) -> None:
    """Take torch's handler of SIGCHLD away, which it sets when a loader starts its workers.

    It raises wherever the main thread is when a worker has ended.  Without it, the loss is noticed
    where the samples are waited for.

    Args:
        before: The handler that ``signal.getsignal`` has returned.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def worker_failure(error: BaseException) -> UserError | None:
    """A sentence for the loss of a worker process; None if ``error`` is something else."""
    text = _first_line(error)
    if text.startswith("Caught "):  # the worker's own exception
        return None
    lost_connection = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if not lost_connection and not text.startswith(("DataLoader worker", "Pin memory thread")):
        return None
    return UserError(
        f"A process that reads samples has ended ({text}), perhaps for want of memory: lower "
        "data.num_workers, or give the job more memory and a larger /dev/shm."
    )


def _exit_on_parents_sigterm() -> None:
    while True:
        received = signal.sigwaitinfo(_STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)


def _wait(items: Iterator[Any], is_stopping: Callable[[], bool]) -> Any:
    deadline = None
    while True:
        try:
            return next(items)
        except StopIteration:
            raise
        except Exception as error:
            if not str(error).startswith("DataLoader timed out"):
                if (failure := worker_failure(error)) is not None:
                    raise failure from error
                raise
        if deadline is None and is_stopping():
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            _kill_workers(items)
            raise UserError(
                f"Stopped without saving: the run was asked to stop, and its worker processes have "
                f"sent no samples for {PATIENCE:.0f} s since; see whether the data can be read, "
                "and start again from the last checkpoint."
            )


def _kill_workers(items: Iterator[Any]) -> None:
    """End workers that hang; the loader itself would wait for each of them."""
    for worker in items._workers:  # type: ignore[attr-defined]
        worker.kill()
        worker.join(timeout=1)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
