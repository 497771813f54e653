"""The order of samples: which samples of every source an epoch holds, and in which order.

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
        sizes: Number of samples of every source.
        counts: Number of samples that an epoch takes of every source; may be below or above its
            size.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def weighted(cls, sizes: Sequence[int], weights: Sequence[float]) -> Blend:
        """An epoch takes ``round(weight * size)`` samples of a source, at least one."""
        counts = (max(1, round(w * n)) for n, w in zip(sizes, weights, strict=True))
        return cls(tuple(sizes), tuple(counts))

    @property
    def epoch_size(self) -> int:
        """Number of samples of an epoch."""
        return sum(self.counts)

    def describe_epoch(self, names: Sequence[str]) -> str:
        """One line for the log, with the names of the sources."""
        parts = [
            f"{name} {count}" + ("" if count == size else f" (of {size})")
            for name, count, size in zip(names, self.counts, self.sizes, strict=True)
        ]
        return f"{self.epoch_size} samples per epoch: {', '.join(parts)}"


class SampleOrder:
    """The endless sequence of dataset indices.

    An epoch lists its samples source by source and permutes the list.  The samples of a source are
    drawn round by round, where a round is a permutation of all of them: entry j of epoch e is draw
    ``m = e * count + j`` of its source, at position ``m % size`` of round ``m // size``.  So no
    sample is drawn again before all others of its source have been drawn.

    Args:
        blend: The samples of an epoch; an integer means one source of that many samples.
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
        self._rounds: dict[tuple[int, int], np.ndarray] = {}  # of the cached epoch

    def sample_at(self, n: int) -> int:
        """Dataset index of sample ``n`` (from 0) of the run."""
        epoch, position = divmod(n, self.size)
        if epoch != self._epoch:  # cached: consecutive samples are nearly always in one epoch
            self._permutation = _permutation(self.size, self.seed, epoch)
            self._rounds.clear()
            self._epoch = epoch
        entry = int(self._permutation[position])
        source = bisect_right(self._ends, entry)
        size, count = self.blend.sizes[source], self.blend.counts[source]
        draw = epoch * count + entry - (self._ends[source] - count)
        return self._offsets[source] + self._in_round(source, *divmod(draw, size))

    def _in_round(self, source: int, number: int, position: int) -> int:
        """Index within its source of the sample at a position of round ``number``."""
        size = self.blend.sizes[source]
        if self.blend.counts[source] % size == 0:
            return position  # every epoch has whole rounds, which its own permutation mixes
        key = (source, number)
        if key not in self._rounds:
            # SeedSequence pads keys with zeros: the 1 keeps them apart from those of epochs.
            self._rounds[key] = _permutation(size, self.seed, source, number, 1)
        return int(self._rounds[key][position])


def _permutation(size: int, *key: int) -> np.ndarray:
    """int64 (size,): a permutation that depends on ``key`` alone.

    numpy guarantees that Philox's raw words stay the same in future versions, which it does not
    for the methods of its Generator.
    """
    return np.argsort(Philox(SeedSequence(key)).random_raw(size), kind="stable")
