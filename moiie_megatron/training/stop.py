"""Stops a run before its last step, on a signal or after a time limit.

A signal may reach any rank.  Every step sums the ranks' flags in the reduction of its loss, so
all ranks stop after the same step, with a checkpoint and exit code 0.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType

# Slurm and torchrun send SIGTERM; SIGUSR1 is what ``sbatch --signal=USR1@120`` asks for.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether the runs of this program stop early, and why.

    Attributes:
        reason: The reason to stop, once all ranks know of it; None: go on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._started = time.monotonic()
        self._seen: set[int] = set()

    def listen(self) -> None:
        """From now on, note the signals instead of being ended by them."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def flags(self, exit_after_minutes: float | None) -> list[float]:
        """1 for each possible reason that holds on this rank, else 0.

        Args:
            exit_after_minutes: Time limit of the run (``train.exit_after_minutes``).
        """
        minutes = (time.monotonic() - self._started) / 60
        over = exit_after_minutes is not None and minutes >= exit_after_minutes
        return [float(number in self._seen) for number in SIGNALS] + [float(over)]

    def resolve(self, flag_sums: Sequence[float], exit_after_minutes: float | None) -> None:
        """Set ``reason`` from the flags summed over all ranks; the first that holds wins."""
        reasons = [f"signal {number.name}" for number in SIGNALS]
        reasons.append(f"train.exit_after_minutes {exit_after_minutes}")
        holding = (reason for reason, count in zip(reasons, flag_sums, strict=True) if count > 0)
        self.reason = next(holding, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen.add(number)
