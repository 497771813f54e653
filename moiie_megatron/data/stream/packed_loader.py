"""The stream of one data-parallel rank with packed rows: a step at a time.

A rank has the samples that it would have without packing, in the same order; only the rows that
they share are made from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch.utils.data import Sampler

from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.loader import (
    BatchSource,
    MicroBatchSampler,
    ReadSamples,
    read_ahead,
)
from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.data.stream.packing import PackingSpec, pack, split_rows_to_count


class StepSampler(Sampler[list[int]]):
    """Dataset indices of one rank's share of every step, from those of its micro-batches."""

    def __init__(self, micro_batches: MicroBatchSampler) -> None:
        self.micro_batches = micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        share: list[int] = []
        for number, indices in enumerate(self.micro_batches, start=1):
            share += indices
            if number % self.micro_batches.per_step == 0:
                yield share
                share = []


def build_packed_loader(
    dataset: BatchSource,
    shape: PackingSpec,
    *,
    seed: int,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    most: Callable[[int], int],
    num_workers: int = 0,
    num_steps: int | None = None,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[list[Batch]]:
    """The micro-batches of one data-parallel rank by step; equally many on all ranks.

    Args:
        shape: Of the rows.
        micro_batch_size: Decides with ``dp_size`` which samples of a step the rank has, as in
            ``build_loader``.
        most: The largest of the numbers that the data-parallel ranks call it with; called once
            a step.
        num_workers: Processes that read ahead, a step each; 0 reads in this process.

    The others are those of ``build_loader``.

    Raises:
        UserError: The batch sizes do not fit; while iterating, too many bad samples in a row.
    """
    sampler = MicroBatchSampler(
        SampleOrder(dataset.blend, seed),
        consumed_samples=consumed_samples,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        num_steps=num_steps,
    )
    shares: Iterator[list[Batch]] = read_ahead(
        ReadSamples(dataset, seed, partial(pack, shape=shape)),
        StepSampler(sampler),
        num_workers=num_workers,
        pin_memory=pin_memory,
        start_method=start_method,
    )
    return (split_rows_to_count(rows, most(len(rows)), shape) for rows in shares)
