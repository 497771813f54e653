"""Samples that cannot be used: replaced the same way in every layout, counted, and limited.

The replacement is a pure function of (seed, index, attempt), so a run on other numbers of ranks
or workers, or one that resumes, sees the same samples.  Workers are processes; they report what
they met inside the batch, and the main process counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol

from numpy.random import Philox, SeedSequence

from moiie_megatron.data.records.llava import BadRecord
from moiie_megatron.data.stream.example import Example, SkippedSample
from moiie_megatron.utils.errors import UserError

MAX_CHAIN: Final = 10  # bad samples in a row, one replacing the other, before the run stops


class Samples(Protocol):
    """A map-style dataset whose items may raise ``BadRecord``."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...


def replacement(seed: int, index: int, tried: Sequence[int], size: int) -> int:
    """The sample that takes the place of sample ``index`` after ``tried`` have failed.

    Drawn from (seed, index, attempt), then moved on past samples already tried.
    ``len(tried)`` is the attempt and must be less than ``size``.
    """
    draw = Philox(SeedSequence([seed, index, len(tried)])).random_raw()
    candidate = int(draw) % size
    while candidate in tried:
        candidate = (candidate + 1) % size
    return candidate


def read_sample(samples: Samples, index: int, seed: int) -> Example:
    """Sample ``index`` or its replacement, with the faults met on the way.

    Raises:
        UserError: ``MAX_CHAIN`` samples in a row, or all there are, could not be used.
    """
    skipped_samples: list[SkippedSample] = []
    tried: list[int] = []
    candidate = index
    while True:
        try:
            return replace(samples[candidate], skipped_samples=tuple(skipped_samples))
        except BadRecord as error:
            skipped_samples.append(SkippedSample(error.file, error.index, error.reason))
            tried.append(candidate)
        if len(tried) == min(MAX_CHAIN, len(samples)):
            last = skipped_samples[-1]
            raise UserError(
                f"Stopping: {len(tried)} samples in a row could not be read, so the data, its "
                f"paths or the template must be wrong; last: {last.file}[{last.index}]: "
                f"{last.reason}."
            )
        candidate = replacement(seed, index, tried, len(samples))


class SkippedSampleMonitor:
    """Counts faults and stops the run when they are too many.

    Args:
        max_share: Largest share of bad samples (``data.max_skipped_fraction``), 0..1.
        minimum: Samples to see before the share counts; a first bad sample is no trend.
        good: Samples that an interrupted run could use.
        bad: Samples that it could not.
    """

    def __init__(self, max_share: float, minimum: int = 100, good: int = 0, bad: int = 0) -> None:
        self.max_share = max_share
        self.minimum = minimum
        self.seen = good + bad
        self.bad = bad

    def add(self, good: int, skipped_samples: Sequence[SkippedSample]) -> None:
        """Count samples that could be used, and those that could not.

        Raises:
            UserError: More than ``max_share`` of the samples tried so far were bad.
        """
        self.bad += len(skipped_samples)
        self.seen += good + len(skipped_samples)
        if (
            not skipped_samples
            or self.seen < self.minimum
            or self.bad <= self.max_share * self.seen
        ):
            return
        last = skipped_samples[-1]
        raise UserError(
            f"Stopping: {self.bad} of {self.seen} samples ({self.bad / self.seen:.1%}) could not "
            f"be read, more than data.max_skipped_fraction {self.max_share:.1%}: repair the data "
            f"or raise the limit; last: {last.file}[{last.index}]: {last.reason}."
        )
