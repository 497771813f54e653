"""The stream of one data-parallel rank with packed rows, one step at a time.

A rank reads the samples that it would read without packing, in the same order; its rows are packed
from the samples of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from moiie_megatron.data.packing.exchange_samples import DataParallelRanks
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.loader import ReadSamples, SampleSource, read_ahead
from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.data.stream.sampler import StepSampler
from moiie_megatron.data.stream.settings import LoaderSettings


def read_steps(dataset: SampleSource, settings: LoaderSettings) -> Iterator[list[Example]]:
    """The samples of every step that one data-parallel rank reads.

    Args:
        dataset: The samples; must be picklable if workers are spawned.
        settings: Batch sizes, rank and workers; ``micro_batch_size`` decides, as without packing,
            which samples of a step the rank reads.

    Raises:
        UserError: While iterating: too many samples in a row were skipped.
    """
    sampler = StepSampler(SampleOrder(dataset.blend, settings.seed), settings)
    # Samples are copied into rows, so the rows are pinned and not the samples.
    settings = replace(settings, pin_memory=False)
    return read_ahead(ReadSamples(dataset, settings, list), sampler, settings)


def pack_steps(
    steps: Iterable[list[Example]],
    spec: PackingSpec,
    ranks: DataParallelRanks | None = None,
    *,
    rows_multiple_of: int = 1,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """The rows of every step of one data-parallel rank, each a micro-batch.

    Args:
        steps: The samples of every step that this rank has read.
        spec: What all rows have in common.
        ranks: The data-parallel ranks, which make the same number of steps; None for one alone.
        rows_multiple_of: See ``pack``.
        pin_memory: Put rows into pinned memory.
    """
    for examples in steps:
        rows = pack(examples, spec, ranks, rows_multiple_of)
        yield [row.pin_memory() for row in rows] if pin_memory else rows
