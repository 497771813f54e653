"""Stops a run before its last step: on a signal, after a time limit, or when a log is lost.

A signal may reach any rank.  Every step sums the ranks' flags in the reduction of its loss, so
all ranks stop after the same step, with a checkpoint and exit code 0.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Final

from moiie_megatron.utils.signals import SignalWatch

# Slurm and torchrun send SIGTERM; SIGUSR1 is what ``sbatch --signal=USR1@120`` asks for; SIGINT is
# Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# The signals that each flag of a rank stands for, in front of the flag for all other reasons.
_FLAGS: Final = ((signal.SIGTERM, signal.SIGINT), (signal.SIGUSR1,))
_ON_INTERRUPT: Final = b"Saving after this step; a second Ctrl-C ends at once, unsaved.\n"


class StopRequest:
    """Whether the runs of this program stop early, and why.

    Attributes:
        reason: The reason to stop, once all ranks know of it; None: go on.
        failure: What went wrong on this rank, so that the run must stop; None: nothing.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.failure: str | None = None
        self._started = time.monotonic()
        self._seen: set[int] = set()
        self._watch: SignalWatch | None = None

    def listen(self, watch: SignalWatch | None = None) -> None:
        """From now on, note the signals instead of being ended by them.

        Args:
            watch: The program's, if it has one; without one no signal is a second Ctrl-C, and
                signals wait for the main thread.
        """
        self._watch = watch
        if watch is not None:
            watch.call(SIGNALS, self._note)
            return
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: self._note(number))

    @contextmanager
    def taking_steps(self) -> Iterator[None]:
        """In the block signals wait for the end of a step, however long it takes."""
        with nullcontext() if self._watch is None else self._watch.patient():
            yield

    def fail(self, sentence: str) -> None:
        """Stop after the next step, with a checkpoint, and raise ``UserError`` in the end."""
        self.failure = self.failure or sentence

    def flags(self, exit_after_minutes: float | None) -> list[float]:
        """1 for each possible reason that holds on this rank, else 0.

        Args:
            exit_after_minutes: Time limit of the run (``train.exit_after_minutes``).
        """
        minutes = (time.monotonic() - self._started) / 60
        over = exit_after_minutes is not None and minutes >= exit_after_minutes
        other = over or self.failure is not None
        return [float(not self._seen.isdisjoint(numbers)) for numbers in _FLAGS] + [float(other)]

    def resolve(self, flag_sums: Sequence[float], exit_after_minutes: float | None) -> None:
        """Set ``reason`` from the flags summed over all ranks; the first that holds wins."""
        # Of two signals with one flag this rank may have seen the other one.
        names = [next((n for n in ns if n in self._seen), ns[0]).name for ns in _FLAGS]
        reasons = [f"signal {name}" for name in names]
        limit = f"train.exit_after_minutes {exit_after_minutes}"
        reasons.append(
            "a log that another process cannot write" if exit_after_minutes is None else limit
        )
        holding = (reason for reason, count in zip(reasons, flag_sums, strict=True) if count > 0)
        self.reason = next(holding, None)

    def _note(self, number: int) -> None:
        self._seen.add(number)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # not print, which may be what the signal has interrupted
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _ON_INTERRUPT)
