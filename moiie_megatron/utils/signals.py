"""Signals end a program in an orderly way, also while it waits inside a library.

Python calls handlers between two instructions of the main thread.  A process that waits for its
peers inside a communication library executes none, so a thread of its own watches, too.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

GRACE: Final = 5.0  # seconds in which the main thread must notice a signal
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Raised in the main thread on a signal, so that blocks are left and files removed.

    A ``KeyboardInterrupt``, which libraries let pass.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def exit_code_of(number: int) -> int:
    """What a program ends with that a signal has stopped: 128 + number, as shells report it.

    0 for SIGUSR1, by which Slurm says that the time of a job is nearly over: a run that has not
    begun has nothing to save, and may go on in the next job.
    """
    return 0 if number == signal.SIGUSR1 else 128 + number


def announce(number: int) -> None:
    """Say in one line which signal ends the program; of several ranks the first says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"Stopped by {signal.Signals(number).name}.", file=sys.stderr, flush=True)


class SignalWatch:
    """In the ``with`` block SIGINT, SIGTERM and SIGHUP raise ``Stopped`` in the main thread.

    The process ends at once if the main thread does not notice a signal within ``grace`` seconds,
    or on a second SIGINT.  SIGINT and SIGHUP stay ignored where they are from the start (background
    jobs of a script, ``nohup``).  Forked processes ignore SIGINT, which a terminal sends to them as
    well, and what ``call`` has given another handler; the other signals end them.

    Args:
        more: Further signals that raise ``Stopped``.
        grace: Seconds.
    """

    def __init__(self, more: Iterable[signal.Signals] = (), grace: float = GRACE) -> None:
        self._numbers = (*ENDING, *more)
        self._grace = grace
        self._noticed: dict[int, float] = {}  # when the main thread has last noticed a signal
        self._is_patient = False
        self._is_ending = False
        self._before: dict[int, Any] = {}
        self._raising: set[int] = set()
        self._read_end = self._write_end = -1

    def __enter__(self) -> SignalWatch:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # From now on Python also writes the number of every signal here, at once.
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self.call(self._numbers, self._raise)
        self._raising = set(self._before)
        _watches().append(self)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        _watches().remove(self)
        for number, handler in self._before.items():
            # What was only noted may be sent again while the program ends.
            signal.signal(number, handler if number in self._raising else signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(self._write_end)  # ends the thread, which closes the other end

    def call(self, numbers: Iterable[signal.Signals], handle: Callable[[int], None]) -> None:
        """From now on call ``handle`` in the main thread on these signals."""

        def note(number: int, frame: FrameType | None) -> None:
            self._noticed[number] = time.monotonic()
            handle(number)

        for number in numbers:
            is_ignored = signal.getsignal(number) is signal.SIG_IGN
            if is_ignored and number in (signal.SIGINT, signal.SIGHUP):
                continue
            self._raising.discard(number)
            before = signal.signal(number, note)
            self._before.setdefault(number, before)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """In the block signals may wait for the main thread as long as it takes."""
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def reset_in_fork(self) -> None:
        """Called in a forked process."""
        for number in self._before:
            ends = number in self._raising and number != signal.SIGINT
            signal.signal(number, signal.SIG_DFL if ends else signal.SIG_IGN)

    def _raise(self, number: int) -> None:
        if not self._is_ending:  # else files are being removed
            self._is_ending = True
            raise Stopped(number)

    def _watch(self) -> None:
        interrupts = 0
        with os.fdopen(self._read_end, "rb", buffering=0) as numbers:
            while data := numbers.read(1):
                number = data[0]
                if number not in self._before:
                    continue
                interrupts += number == signal.SIGINT
                if interrupts > 1 and number == signal.SIGINT:
                    self._end(number)
                words = (number, time.monotonic())
                timer = threading.Timer(self._grace, self._end_unnoticed, words)
                timer.daemon = True
                timer.start()

    def _end_unnoticed(self, number: int, received: float) -> None:
        # Python may call the handler a moment before this thread reads the number.
        is_noticed = self._noticed.get(number, 0.0) > received - self._grace / 2
        if not is_noticed and not self._is_patient:
            self._end(number)

    def _end(self, number: int) -> None:
        announce(number)
        os._exit(exit_code_of(number))


@functools.cache
def _watches() -> list[SignalWatch]:
    """The watches of this process that are in use."""
    found: list[SignalWatch] = []

    def in_child() -> None:
        if found:
            signal.set_wakeup_fd(-1)  # the pipe is the parent's
            for watch in found:
                watch.reset_in_fork()

    os.register_at_fork(after_in_child=in_child)
    return found
