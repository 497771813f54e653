"""How long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

# Told after every piece of work: how much is done, and how much there is in all (bytes, samples).
ProgressFn = Callable[[int, int], object]
