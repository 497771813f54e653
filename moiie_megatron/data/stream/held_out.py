"""Held-out samples as micro-batches of forward passes, the same samples in every parallel layout.

The samples of all sources stand one after the other.  They are read in rounds of as many samples
as a step has, which are dealt to the data-parallel ranks as those of a step; the last round is
shorter.  Where samples are lacking, and in place of those that cannot be read, there is padding:
every rank has equally many micro-batches, and each sample is in one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

from torch.utils.data import Sampler

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.packing.exchange_samples import DataParallelRanks
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.build import batch_maker, image_loader, packing_spec
from moiie_megatron.data.stream.dataset import LlavaDataset, Source
from moiie_megatron.data.stream.example import Example, SkippedSample, filler
from moiie_megatron.data.stream.loader import ReadSamples, read_ahead
from moiie_megatron.data.stream.settings import LoaderSettings


@dataclass(frozen=True)
class HeldOut:
    """The held-out samples of a run, by their number.  Picklable.

    Attributes:
        dataset: All records of the sources.
        counts: How many samples of every source are used, its first ones.
    """

    dataset: LlavaDataset
    counts: tuple[int, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.counts))

    @property
    def names(self) -> list[str]:
        """Of the sources."""
        return [source.label for source in self.dataset.sources]

    def __len__(self) -> int:
        return sum(self.counts)

    def source_of(self, number: int) -> int:
        """Which source the sample of this number is of."""
        return next(source for source, end in enumerate(self._ends) if number < end)

    def __getitem__(self, number: int) -> Example:
        """A sample, whose ``record_id`` is its number; padding beyond the last one.

        A sample that cannot be read is padding, too, and is in its ``skipped_samples``.
        """
        pad_id, image_size = self.dataset.pad_id, self.dataset.image_size
        if number >= len(self):
            return filler(pad_id, image_size)
        source = self.source_of(number)
        before = sum(len(one.records) for one in self.dataset.sources[:source])
        index = number - (self._ends[source] - self.counts[source])
        try:
            return replace(self.dataset[before + index], record_id=str(number))
        except BadRecord as error:
            return filler(
                pad_id, image_size, (SkippedSample(error.file, error.index, error.reason),)
            )

    def describe(self) -> str:
        """One phrase for the log: the samples of every source."""
        parts = [
            f"{source.label} {count}"
            + ("" if count == len(source.records) else f" (the first of {len(source.records)})")
            for source, count in zip(self.dataset.sources, self.counts, strict=True)
        ]
        return f"{len(self)} samples: {', '.join(parts)}"


def open_held_out(config: RunConfig, encoding: Encoding) -> HeldOut | None:
    """The samples of ``data.validation``; None without sources.

    Args:
        encoding: As in training.

    Raises:
        UserError: A file or directory is missing or unreadable.
    """
    validation = config.data.validation
    if not validation.sources:
        return None
    sources = [
        Source(RecordFile(one.records), image_loader(config, one.images), name=one.label)
        for one in validation.sources
    ]
    limit = validation.samples or math.inf
    counts = (int(min(len(source.records), limit)) for source in sources)
    return HeldOut(LlavaDataset(sources, encoding), tuple(counts))


def held_out_rounds(
    config: RunConfig,
    samples: HeldOut,
    ranks: DataParallelRanks,
    *,
    pin_memory: bool = False,
    is_stopping: Callable[[], bool] = bool,
) -> Iterator[list[Batch]]:
    """This data-parallel rank's micro-batches of every round; every rank calls this.

    Args:
        config: Checked against the number of ranks.
        samples: All of them are read, once.
        pin_memory: Put batches into pinned memory.
        is_stopping: See ``build_train_loader``.

    Raises:
        UserError: While iterating: samples cannot be read at all.
    """
    settings = LoaderSettings(
        seed=0,  # nothing is drawn
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        num_workers=config.data.num_workers,
        pin_memory=pin_memory and not config.data.packing,
        is_stopping=is_stopping,
    )
    rounds = plan_rounds(len(samples), settings, config.micro_batches_multiple_of)
    if not config.data.packing:
        plan = [micro_batch for own in rounds for micro_batch in own]
        make = batch_maker(config, samples.dataset)
        batches = read_ahead(_ReadHeldOut(samples, settings, make), _Planned(plan), settings)
        for own in rounds:
            yield list(islice(batches, len(own)))
        return
    plan = [[number for micro_batch in own for number in micro_batch] for own in rounds]
    spec = packing_spec(config, samples.dataset)
    for examples in read_ahead(_ReadHeldOut(samples, settings, list), _Planned(plan), settings):
        rows = pack(examples, spec, ranks, config.micro_batches_multiple_of)
        yield [row.pin_memory() for row in rows] if pin_memory else rows


def plan_rounds(
    total: int, settings: LoaderSettings, micro_batches_multiple_of: int = 1
) -> list[list[list[int]]]:
    """The numbers of the samples of every micro-batch of a rank, by round.

    Micro-batch j of rank r is micro-batch ``j * dp_size + r`` of its round.

    Args:
        total: Samples of all ranks; larger numbers stand for padding.
        settings: Batch sizes and the rank.
        micro_batches_multiple_of: What the micro-batches of a rank in a round are a multiple of.
    """
    size, dp_size = settings.micro_batch_size, settings.dp_size
    rounds, start = [], 0
    while start < total:
        needed = min(math.ceil((total - start) / (size * dp_size)), settings.micro_batches_per_step)
        count = math.ceil(needed / micro_batches_multiple_of) * micro_batches_multiple_of
        firsts = [start + (j * dp_size + settings.dp_rank) * size for j in range(count)]
        rounds.append([list(range(first, first + size)) for first in firsts])
        start += count * size * dp_size
    return rounds


class _Planned(Sampler[list[int]]):
    """The given lists of numbers."""

    def __init__(self, plan: Sequence[list[int]]) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._plan)


class _ReadHeldOut(ReadSamples):
    """Nothing replaces a sample that cannot be read."""

    def __init__(
        self,
        samples: HeldOut,
        settings: LoaderSettings,
        make: Callable[[Sequence[Example]], Any],
    ) -> None:
        super().__init__(samples.dataset, settings, make)
        self._samples = samples

    def _read(self, i: int) -> Example:
        return self._samples[i]
