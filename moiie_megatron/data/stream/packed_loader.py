"""The stream of one data-parallel rank with packed rows, one step at a time.

A rank has the samples that it would have without packing, in the same order; its rows are packed
from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.loader import ReadSamples, SampleSource, read_ahead
from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.data.stream.packing import PackingSpec, equalize_row_counts, pack
from moiie_megatron.data.stream.sampler import StepSampler
from moiie_megatron.data.stream.settings import LoaderSettings


def build_packed_loader(
    dataset: SampleSource,
    settings: LoaderSettings,
    spec: PackingSpec,
    max_over_dp: Callable[[int], int],
    rows_multiple_of: int = 1,
) -> Iterator[list[Batch]]:
    """The rows of every step of one data-parallel rank, each a micro-batch.

    All ranks have the same number of rows in a step.  A worker packs one step at a time.

    Args:
        dataset: The samples; must be picklable if workers are spawned.
        settings: Batch sizes, rank and workers; ``micro_batch_size`` decides, as without packing,
            which samples of a step the rank has.
        spec: What all rows have in common.
        max_over_dp: The maximum of a number over the data-parallel ranks; called once per step.
        rows_multiple_of: The number of rows is a multiple of this, and so must be the number of
            samples.

    Raises:
        UserError: While iterating: too many samples in a row were skipped.
    """
    sampler = StepSampler(SampleOrder(dataset.blend, settings.seed), settings)
    items = ReadSamples(dataset, settings, partial(pack, spec=spec))
    steps = read_ahead(items, sampler, settings)
    return equalize_row_counts(steps, spec, max_over_dp, rows_multiple_of)
