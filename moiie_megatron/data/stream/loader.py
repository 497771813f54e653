"""The loader: worker processes read and batch the samples of one data-parallel rank.

Sample n of the run is a pure function of (seed, blend, n) (``data/stream/order.py``), and the rank
that reads it follows from the layout (``data/stream/sampler.py``).  So the global batches of a run
do not depend on the number of ranks or workers, and the whole state of the stream is one integer:
the number of samples consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.order import Blend, SampleOrder
from moiie_megatron.data.stream.sampler import MicroBatchSampler
from moiie_megatron.data.stream.settings import LoaderSettings
from moiie_megatron.data.stream.skipped_samples import read_sample
from moiie_megatron.data.stream.worker import (
    POLL_INTERVAL,
    flatten_in_worker,
    ignore_group_signals,
    receive,
)
from moiie_megatron.utils.errors import UserError


class SampleSource(Protocol):
    """A map-style dataset with a blend of its sources (``LlavaDataset``)."""

    blend: Blend

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...


class ReadSamples(Dataset[Any]):
    """Map-style dataset: sample indices -> ``make(samples)``, computed in the worker.

    Args:
        source: The samples.
        settings: The seed decides which sample replaces a skipped one.
        make: From the samples to one item of the stream, for example a micro-batch; picklable.
    """

    def __init__(
        self,
        source: SampleSource,
        settings: LoaderSettings,
        make: Callable[[Sequence[Example]], Any],
    ) -> None:
        self._source = source
        self._seed = settings.seed
        self._max_skipped_fraction = settings.max_skipped_fraction
        self._make = make

    def __getitem__(self, indices: list[int]) -> Any:
        # torch raises a worker's exception again with the worker's traceback in its message: right
        # for a bug, but a user error is one sentence, so it travels as a value.
        try:
            return self._make([self._read(i) for i in indices])
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"Samples cannot be read ({error}): repair that and start again.")

    def _read(self, i: int) -> Example:
        return read_sample(self._source, i, self._seed, self._max_skipped_fraction)


def build_loader(
    dataset: SampleSource, settings: LoaderSettings, make: Callable[[Sequence[Example]], Batch]
) -> Iterator[Batch]:
    """The micro-batches of one data-parallel rank, in order.

    All tensor- and pipeline-parallel peers of the rank build the same stream.

    Args:
        dataset: The samples; must be picklable if workers are spawned.
        settings: Batch sizes, rank and workers.
        make: From the samples of a micro-batch to the batch; picklable.

    Raises:
        UserError: While iterating: too many samples in a row were skipped.
    """
    sampler = MicroBatchSampler(SampleOrder(dataset.blend, settings.seed), settings)
    return read_ahead(ReadSamples(dataset, settings, make), sampler, settings)


def read_ahead(
    items: ReadSamples, sampler: Sampler[list[int]], settings: LoaderSettings
) -> Iterator[Any]:
    """The items of the sampler's indices in order, read by worker processes.

    Raises:
        UserError: While iterating: the one that a worker sent in place of an item; or a worker
            has ended, or sends nothing while the run should stop.
    """
    num_workers = settings.num_workers
    loader: DataLoader[Any] = DataLoader(
        items,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=flatten_in_worker if num_workers else _unchanged,
        pin_memory=settings.pin_memory,
        worker_init_fn=ignore_group_signals,
        multiprocessing_context=settings.start_method if num_workers else None,
        timeout=POLL_INTERVAL if num_workers else 0,
        # Its own generator: the default would draw from the RNG that dropout uses.
        generator=torch.Generator(),
    )
    received = receive(loader, settings.is_stopping) if num_workers else iter(loader)
    return _raise_errors(received)


def _unchanged(item: Any) -> Any:
    return item


def _raise_errors(received: Iterator[Any]) -> Iterator[Any]:
    for item in received:
        if isinstance(item, UserError):
            raise item
        yield item
