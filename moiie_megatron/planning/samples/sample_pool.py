"""The samples of a run in their order, from the counts of a data report.

An order of samples is drawn by the code of training (``data/stream/order.py``), so sources have
their weights and an epoch has every sample.  A report does not say which record has which size:
the steps are like those of the run, not the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Philox, SeedSequence

from moiie_megatron.data.stream.order import Blend, SampleOrder
from moiie_megatron.planning.samples.data_report import DataReport
from moiie_megatron.planning.workload import SampleShape


@dataclass(frozen=True)
class SampleMeans:
    """What a sample of an epoch has on average.

    Attributes:
        tokens: Tokens, image tokens included.
        images: Images.
        labels: Tokens with a label.
    """

    tokens: float
    images: float
    labels: float


class SamplePool:
    """The samples that a run draws.

    Args:
        report: What they are.
        seed: Of the run.
    """

    def __init__(self, report: DataReport, seed: int) -> None:
        self.report = report
        self._seed = seed
        sizes = [source.records for source in report.sources]
        self.blend = Blend.weighted(sizes, [source.weight for source in report.sources])
        self._order = SampleOrder(self.blend, seed)
        self._samples, self._images, self._tokens, self._labels, self.most_labels = (
            np.concatenate([getattr(source, name) for source in report.sources])
            for name in ("samples", "images", "tokens", "labels", "most_labels")
        )
        # Of every entry: the samples up to its end, and the number of its source.
        self._ends = np.cumsum(self._samples)
        self._first_entry = np.cumsum([0, *(len(source.samples) for source in report.sources)])
        self._first_record = np.cumsum([0, *sizes])

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        return self.blend.epoch_size

    def draw(self, first: int, count: int) -> list[SampleShape]:
        """Samples ``first`` to ``first + count - 1`` of the run, in their order."""
        records = [self._order.sample_at(n) for n in range(first, first + count)]
        return self._shapes([self._usable(record) for record in records])

    def means(self) -> SampleMeans:
        """Of the samples of an epoch; records that are skipped have the mean of all others."""
        counts = np.array(self.blend.counts, float)
        columns = np.stack([self._tokens, self._images * self._samples, self._labels])
        overall = columns.sum(axis=1) / self._ends[-1]
        sums = np.zeros(3)
        for number, source in enumerate(self.report.sources):
            entries = slice(*self._first_entry[number : number + 2])
            skipped = source.records - source.samples.sum()
            total = columns[:, entries].sum(axis=1) + skipped * overall
            sums += counts[number] * total / source.records
        return SampleMeans(*(sums / counts.sum()).tolist())

    def entries(self) -> list[tuple[SampleShape, float]]:
        """One sample of every kind, with its probability to be drawn.

        Its labels are the most that a sample of that kind has.
        """
        sources = self.report.sources
        share = np.array(self.blend.counts, float) / self.epoch_size
        skipped = sum(
            part * (source.records - int(source.samples.sum())) / source.records
            for part, source in zip(share, sources, strict=True)
        )
        weights = np.concatenate(
            [part * one.samples / one.records for part, one in zip(share, sources, strict=True)]
        )
        weights += skipped * self._samples / self._ends[-1]
        tokens = -(-self._tokens // self._samples)
        columns = (tokens, self._images, self.most_labels, weights)
        return [
            (SampleShape(length, images, labels), weight)
            for length, images, labels, weight in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _usable(self, record: int) -> int:
        """The number of a sample that can be used, counted over all sources, for a record.

        The records of a source that are skipped count as its last ones.  As in training, any
        sample of the mixture replaces them.
        """
        number = int(np.searchsorted(self._first_record, record, side="right")) - 1
        before = int(self._ends[self._first_entry[number] - 1]) if self._first_entry[number] else 0
        sample = before + record - int(self._first_record[number])
        last = self._first_entry[number + 1]
        if last and sample < self._ends[last - 1]:
            return sample
        drawn = Philox(SeedSequence([self._seed, record])).random_raw()
        return int(drawn) % int(self._ends[-1])

    def _shapes(self, samples: Sequence[int]) -> list[SampleShape]:
        numbers = np.array(samples, np.int64)
        entry = np.searchsorted(self._ends, numbers, side="right")
        # The samples of an entry differ by one token or label at most, and have its sum.
        position = numbers - (self._ends[entry] - self._samples[entry])
        columns = []
        for totals in (self._tokens, self._labels):
            each, more = np.divmod(totals[entry], self._samples[entry])
            columns.append((each + (position < more)).tolist())
        tokens, labels = columns
        images = self._images[entry].tolist()
        return [SampleShape(*one) for one in zip(tokens, images, labels, strict=True)]
