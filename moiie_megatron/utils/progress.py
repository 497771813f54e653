"""How long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

# Told after every piece of work: how much is done, and how much there is in all (bytes, samples).
ProgressFn = Callable[[int, int], object]
# Told sentences that a user should read.
NoteFn = Callable[[str], object]


class ProgressCounter:
    """Counts what is done and tells it.

    Args:
        total: How much there is in all.
        tell: Told after every ``add``; None: nobody is.
    """

    def __init__(self, total: int, tell: ProgressFn | None) -> None:
        self.total = total
        self._tell = tell
        self._done = 0

    def add(self, count: int) -> None:
        """So much more is done."""
        self._done += count
        if self._tell is not None:
            self._tell(self._done, self.total)
