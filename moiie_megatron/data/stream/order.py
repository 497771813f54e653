"""The order of samples: which samples of which source an epoch holds, and where each comes.

Sample n of a run is a pure function of (seed, blend, n).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.random import Philox, SeedSequence


@dataclass(frozen=True)
class Blend:
    """How many samples of every source an epoch has.

    Attributes:
        sizes: Samples of every source.
        counts: How many of them one epoch sees; may be fewer or more than there are.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def weighted(cls, sizes: Sequence[int], weights: Sequence[float]) -> Blend:
        """An epoch sees ``round(weight * size)`` samples of a source, at least one."""
        counts = (max(1, round(w * n)) for n, w in zip(sizes, weights, strict=True))
        return cls(tuple(sizes), tuple(counts))

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch."""
        return sum(self.counts)

    def describe(self) -> str:
        """Everything that the order depends on beside the seed, as ``40 of 40, 20 of 41``."""
        return ", ".join(f"{n} of {size}" for n, size in zip(self.counts, self.sizes, strict=True))

    def describe_epoch(self, names: Sequence[str]) -> str:
        """One line for the log, with the names of the sources."""
        parts = [
            f"{name} {count}" + ("" if count == size else f" (of {size})")
            for name, count, size in zip(names, self.counts, self.sizes, strict=True)
        ]
        return f"{self.epoch_size} samples per epoch: {', '.join(parts)}"


class SampleOrder:
    """The endless sequence of dataset indices.

    An epoch lists its samples source by source and permutes the list.  A source is gone through
    round by round: entry j of epoch e is number ``m = e * count + j`` of its source, which is
    place ``m % size`` of round ``m // size``.  So no epoch is given a sample a second time before
    all others of its source came once; rounds that share an epoch are mixed by its permutation.

    Args:
        blend: The samples of an epoch; a number stands for one source of that many.
        seed: Seed of the run.
    """

    def __init__(self, blend: Blend | int, seed: int) -> None:
        self.blend = Blend((blend,), (blend,)) if isinstance(blend, int) else blend
        self.size = self.blend.epoch_size
        self.seed = seed
        self._ends = list(accumulate(self.blend.counts))
        self._offsets = [0, *accumulate(self.blend.sizes)]
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)
        self._rounds: dict[tuple[int, int], np.ndarray] = {}  # of the running epoch

    def sample_at(self, n: int) -> int:
        """Dataset index of sample ``n`` (from 0) of the run."""
        epoch, place = divmod(n, self.size)
        if epoch != self._epoch:  # kept: neighbours are nearly always in the same epoch
            self._permutation = _permutation(self.size, self.seed, epoch)
            self._rounds.clear()
            self._epoch = epoch
        entry = int(self._permutation[place])
        source = bisect_right(self._ends, entry)
        size, count = self.blend.sizes[source], self.blend.counts[source]
        number = epoch * count + entry - (self._ends[source] - count)
        return self._offsets[source] + self._in_round(source, *divmod(number, size))

    def _in_round(self, source: int, number: int, place: int) -> int:
        """Sample of a source at a place of its round ``number``."""
        size = self.blend.sizes[source]
        if self.blend.counts[source] % size == 0:
            return place  # every epoch has whole rounds and permutes them anyway
        key = (source, number)
        if key not in self._rounds:
            # SeedSequence fills up with zeros: the 1 keeps the keys apart from those of epochs.
            self._rounds[key] = _permutation(size, self.seed, source, number, 1)
        return int(self._rounds[key][place])


def _permutation(size: int, *key: int) -> np.ndarray:
    """int64 [size]: a permutation that depends on ``key`` alone.

    Philox's raw words, unlike numpy's Generator methods, are promised not to change between
    numpy versions.
    """
    return np.argsort(Philox(SeedSequence(key)).random_raw(size), kind="stable")
