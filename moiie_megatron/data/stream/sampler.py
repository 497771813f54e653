"""Which data-parallel rank reads which sample of the run.

Micro-batch j of data-parallel rank r is micro-batch ``j * dp_size + r`` of its step, so the global
batches of a run do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.data.stream.settings import LoaderSettings


class MicroBatchSampler(Sampler[list[int]]):
    """Dataset indices of every micro-batch of one rank.

    Args:
        order: The order of the run's samples.
        settings: Batch sizes and the rank.
    """

    def __init__(self, order: SampleOrder, settings: LoaderSettings) -> None:
        self._order = order
        self._settings = settings

    def __iter__(self) -> Iterator[list[int]]:
        settings = self._settings
        step = 0
        while settings.num_steps is None or step < settings.num_steps:
            base = settings.consumed_samples + step * settings.global_batch_size
            end = base + settings.global_batch_size
            first = base + settings.dp_rank * settings.micro_batch_size
            for start in range(first, end, settings.dp_size * settings.micro_batch_size):
                samples = range(start, start + settings.micro_batch_size)
                yield [self._order.sample_at(n) for n in samples]
            step += 1


class StepSampler(Sampler[list[int]]):
    """Dataset indices of all samples of one rank in a step, those of its micro-batches in order.

    The arguments are those of ``MicroBatchSampler``.
    """

    def __init__(self, order: SampleOrder, settings: LoaderSettings) -> None:
        self._micro_batches = MicroBatchSampler(order, settings)
        self._per_step = settings.micro_batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        portion: list[int] = []
        for number, indices in enumerate(self._micro_batches, start=1):
            portion += indices
            if number % self._per_step == 0:
                yield portion
                portion = []
