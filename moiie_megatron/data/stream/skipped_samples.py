"""Samples that cannot be used are skipped: replaced, counted, and limited in number.

The replacement is a pure function of (seed, index, attempt), so a run on other numbers of ranks
or workers, or one that resumes, sees the same samples.  Worker processes report the skipped
samples inside the batch; the training process counts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol

from numpy.random import Philox, SeedSequence

from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.example import Example, SkippedSample
from moiie_megatron.utils.errors import UserError

# Skipped samples in a row, each replacing the one before, that stop the run: at least so many, and
# so many that chance makes a row of them with at most this probability.
_MIN_IN_A_ROW: Final = 10
_CHANCE: Final = 1e-15
_MAX_IN_A_ROW: Final = 4096


class Samples(Protocol):
    """A map-style dataset whose items may raise ``BadRecord``."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...


def replacement(seed: int, index: int, tried: Sequence[int], size: int) -> int:
    """The index of the sample that replaces sample ``index``.

    Drawn from (seed, index, attempt), then advanced past samples already tried.

    Args:
        seed: Seed of the run.
        index: The sample to replace.
        tried: Samples that were skipped so far, ``index`` included, fewer than ``size``; their
            number is the attempt.
        size: Number of samples.
    """
    draw = Philox(SeedSequence([seed, index, len(tried)])).random_raw()
    candidate = int(draw) % size
    while candidate in tried:
        candidate = (candidate + 1) % size
    return candidate


def most_in_a_row(max_fraction: float) -> int:
    """Skipped samples in a row that stop a run which may skip ``max_fraction`` of its samples.

    Where that many are allowed, a row of 10 is no sign of wrong data: at a half, one sample in a
    thousand is replaced ten times.
    """
    if not 0.0 < max_fraction < 1.0:
        return _MIN_IN_A_ROW if max_fraction <= 0.0 else _MAX_IN_A_ROW
    likely = math.ceil(math.log(_CHANCE) / math.log(max_fraction))
    return min(max(_MIN_IN_A_ROW, likely), _MAX_IN_A_ROW)


def read_sample(samples: Samples, index: int, seed: int, max_fraction: float = 0.01) -> Example:
    """Sample ``index`` or its replacement, which names the samples skipped before it.

    Args:
        samples: All there are.
        index: The sample to read.
        seed: Seed of the run.
        max_fraction: Largest fraction of skipped samples (``data.max_skipped_fraction``), 0..1.

    Raises:
        UserError: ``most_in_a_row`` samples in a row, or all there are, were skipped.
    """
    most = min(most_in_a_row(max_fraction), len(samples))
    skipped_samples: list[SkippedSample] = []
    tried: list[int] = []
    candidate = index
    while True:
        try:
            return replace(samples[candidate], skipped_samples=tuple(skipped_samples))
        except BadRecord as error:
            skipped_samples.append(SkippedSample(error.file, error.index, error.reason))
            tried.append(candidate)
        if len(tried) == most:
            last = skipped_samples[-1]
            raise UserError(
                f"Stopping: {len(tried)} samples in a row could not be read, so the data, its "
                f"paths or the template must be wrong; last: {last.file}[{last.index}]: "
                f"{last.reason}."
            )
        candidate = replacement(seed, index, tried, len(samples))


class SkippedSampleMonitor:
    """Counts skipped samples and stops the run when there are too many.

    Args:
        max_fraction: Largest fraction of skipped samples (``data.max_skipped_fraction``), 0..1.
        minimum: Samples to read before the fraction is checked: the first skipped sample is not
            a trend.
        num_used: Samples that the run used before it was interrupted.
        num_skipped: Samples that it skipped.
    """

    def __init__(
        self, max_fraction: float, minimum: int = 100, num_used: int = 0, num_skipped: int = 0
    ) -> None:
        self.max_fraction = max_fraction
        self.minimum = minimum
        self.num_read = num_used + num_skipped
        self.num_skipped = num_skipped

    def add(self, num_used: int, skipped_samples: Sequence[SkippedSample]) -> None:
        """Count samples that were used, and those that were skipped.

        Raises:
            UserError: More than ``max_fraction`` of the samples read so far were skipped.
        """
        self.num_skipped += len(skipped_samples)
        self.num_read += num_used + len(skipped_samples)
        if not skipped_samples or self.num_read < self.minimum or self.num_skipped <= self._most():
            return
        last = skipped_samples[-1]
        raise UserError(
            f"Stopping: {self.num_skipped} of {self.num_read} samples "
            f"({self.num_skipped / self.num_read:.1%}) were skipped, more than "
            f"data.max_skipped_fraction {self.max_fraction:.1%}: repair the data or raise the "
            f"limit; last: {last.file}[{last.index}]: {last.reason}."
        )

    def _most(self) -> float:
        """Skipped samples that are not too many.

        So many that data of which exactly ``max_fraction`` cannot be used stay below in the order
        of the run too, which is random: four standard deviations above the mean, and four samples
        for the beginning of a run, where the distribution is not yet normal.
        """
        if self.max_fraction == 0.0:
            return 0.0
        mean = self.max_fraction * self.num_read
        return mean + 4 * math.sqrt(mean * (1 - self.max_fraction)) + 4
