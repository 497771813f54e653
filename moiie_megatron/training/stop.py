"""When a run ends before its last step: somebody asked for it, or its time is over.

Any rank may be asked; the ranks tell each other with the reduction of the loss that every step
makes, so all of them end after the same step, with a checkpoint and exit code 0.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType

# Slurm and torchrun send SIGTERM; SIGUSR1 is what ``sbatch --signal=USR1@120`` asks for.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Why the runs of this program shall end early, if they shall.

    Attributes:
        reason: What all ranks have agreed on; None: go on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._started = time.monotonic()
        self._seen: set[int] = set()

    def listen(self) -> None:
        """Note signals from now on instead of dying of them."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def stop_flags(self, exit_after_minutes: float | None) -> list[float]:
        """1 for each possible reason that this rank knows of, else 0."""
        minutes = (time.monotonic() - self._started) / 60
        over = exit_after_minutes is not None and minutes >= exit_after_minutes
        return [float(number in self._seen) for number in SIGNALS] + [float(over)]

    def decide(self, stop_flags: Sequence[float], exit_after_minutes: float | None) -> None:
        """Set ``reason`` from the summed flags of all ranks."""
        reasons = [f"signal {number.name}" for number in SIGNALS]
        reasons.append(f"train.exit_after_minutes {exit_after_minutes}")
        given = [reason for reason, count in zip(reasons, stop_flags, strict=True) if count > 0]
        self.reason = given[0] if given else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen.add(number)
