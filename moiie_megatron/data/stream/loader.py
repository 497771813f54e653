"""Who reads which sample, and the loader that reads them.

Sample n of the run is a pure function of (seed, blend, n): ``data/stream/order.py``.  Where n is
read follows from the layout: micro-batch j of data-parallel rank r is micro-batch
``j * dp_size + r`` of its step.  So the global batches of a run do not depend on the number of
ranks or workers, and the whole state of the stream is one integer: the samples consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.order import Blend, SampleOrder
from moiie_megatron.data.stream.skipped_samples import read_sample
from moiie_megatron.data.stream.worker import ignore_group_signals
from moiie_megatron.utils.errors import UserError


class BatchSource(Protocol):
    """A map-style dataset that knows how to be collated (``LlavaDataset``)."""

    @property
    def pad_id(self) -> int: ...

    num_image_tokens: int
    blend: Blend

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...


class MicroBatchSampler(Sampler[list[int]]):
    """Dataset indices of the micro-batches of one data-parallel rank.

    Args:
        order: The order of the run.
        consumed_samples: Samples that earlier steps have used, on all ranks together.
        global_batch_size: Samples per step on all ranks together.
        micro_batch_size: Samples per micro-batch.
        dp_rank: This rank, from 0.
        dp_size: Number of data-parallel ranks.
        num_steps: Steps to yield; None is endless.

    Raises:
        UserError: The global batch cannot be divided.
        ValueError: The rank is not below the size, or a number is negative.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        consumed_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        num_steps: int | None = None,
    ) -> None:
        portion = micro_batch_size * dp_size
        if global_batch_size % portion or global_batch_size <= 0:
            raise UserError(
                f"train.global_batch_size {global_batch_size} is not a multiple of "
                f"train.micro_batch_size {micro_batch_size} x {dp_size} data-parallel ranks: "
                f"choose a multiple of {portion}."
            )
        if not 0 <= dp_rank < dp_size or consumed_samples < 0:
            raise ValueError(
                f"data-parallel rank {dp_rank} of {dp_size}, {consumed_samples} consumed samples"
            )
        self.order = order
        self.consumed_samples = consumed_samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.num_steps = num_steps

    @property
    def per_step(self) -> int:
        """Micro-batches of this rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while self.num_steps is None or step < self.num_steps:
            base = self.consumed_samples + step * self.global_batch_size
            end = base + self.global_batch_size
            first = base + self.dp_rank * self.micro_batch_size
            for start in range(first, end, self.dp_size * self.micro_batch_size):
                samples = range(start, start + self.micro_batch_size)
                yield [self.order.sample_at(n) for n in samples]
            step += 1


class ReadSamples(Dataset[Any]):
    """Indices to what is made of their samples, in the worker; a ``UserError`` instead where the
    run must stop.

    Args:
        source: The samples.
        seed: Choice of replacements.
        make: From the samples to the work item; picklable.
    """

    def __init__(
        self, source: BatchSource, seed: int, make: Callable[[Sequence[Example]], Any]
    ) -> None:
        self._source = source
        self._seed = seed
        self._make = make

    def __getitem__(self, indices: list[int]) -> Any:
        # torch raises a worker's exception again with the worker's traceback in its message: right
        # for a bug, but a user error is one sentence, so it travels as a value.
        try:
            return self._make([read_sample(self._source, i, self._seed) for i in indices])
        except UserError as error:
            return error


def build_loader(
    dataset: BatchSource,
    *,
    seed: int,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_to: int | None = None,
    multiple_of: int = 1,
    num_workers: int = 0,
    num_steps: int | None = None,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[Batch]:
    """The micro-batches of one data-parallel rank, in order.

    All tensor- and pipeline-parallel peers of the rank build the same stream.

    Args:
        dataset: The samples; must be picklable when workers are spawned.
        seed: Order of the samples and choice of replacements.
        consumed_samples: Where to resume (0 at the start).
        global_batch_size: Samples per step on all ranks together.
        micro_batch_size: Samples per micro-batch.
        dp_rank: This rank, from 0.
        dp_size: Number of data-parallel ranks.
        pad_to: Length of every batch; None pads to the longest sample.
        multiple_of: Every length is a multiple of this.
        num_workers: Processes that read ahead; 0 reads in this process.
        num_steps: Steps to yield; None is endless.
        pin_memory: Put batches into pinned memory (copies to a GPU then do not wait).
        start_method: How workers start: fork, spawn, forkserver; None is Python's default.

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
    make = partial(
        collate,
        pad_id=dataset.pad_id,
        num_image_tokens=dataset.num_image_tokens,
        pad_to=pad_to,
        multiple_of=multiple_of,
    )
    return read_ahead(
        ReadSamples(dataset, seed, make),
        sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        start_method=start_method,
    )


def read_ahead(
    items: ReadSamples,
    sampler: Sampler[list[int]],
    *,
    num_workers: int,
    pin_memory: bool,
    start_method: str | None,
) -> Iterator[Any]:
    """The items of the sampler's indices in order, read by ``num_workers`` processes.

    Raises:
        UserError: While iterating: the one that stands in place of an item.
    """
    loader: DataLoader[Any] = DataLoader(
        items,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=ignore_group_signals,
        multiprocessing_context=start_method if num_workers else None,
        # Its own generator: the default would draw from the RNG that dropout uses.
        generator=torch.Generator(),
    )
    return _raise_errors(loader)


def _unchanged(item: Any) -> Any:
    return item


def _raise_errors(loader: DataLoader[Any]) -> Iterator[Any]:
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item
