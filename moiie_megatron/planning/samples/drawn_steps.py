"""Steps as a run has them: samples in its order, dealt to micro-batches and ranks by its rules.

With packing, the rows are those of the code of training (``data/packing/deal_rows.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.packing.deal_rows import deal_rows
from moiie_megatron.planning.samples.data_report import DataReport
from moiie_megatron.planning.samples.sample_pool import SamplePool
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload

# Steps that are drawn, and the samples beyond which they are fewer.
_MAX_STEPS: Final = 64
_MAX_SAMPLES: Final = 1 << 14
_MIN_STEPS: Final = 4

Step = tuple[tuple[MicroBatchShape, ...], ...]  # by data-parallel rank, its micro-batches


@dataclass(frozen=True)
class BatchRules:
    """What decides which samples share a micro-batch.

    Attributes:
        global_batch_size: Samples of a step on all ranks.
        micro_batch_size: Samples of a micro-batch without packing.
        dp_size: Number of data-parallel ranks.
        packing: Several samples in a row.
        max_length: Most tokens of a row.
        num_image_tokens: Positions per image.
        multiple_of: The length of a row is a multiple of this.
        pads_to_max: Rows are padded to ``max_length``, not to the longest of the micro-batch.
        rows_multiple_of: The rows of a rank are a multiple of this with packing.
        seed: Of the order of samples.
    """

    global_batch_size: int
    micro_batch_size: int
    dp_size: int
    packing: bool
    max_length: int
    num_image_tokens: int
    multiple_of: int
    pads_to_max: bool
    rows_multiple_of: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig, dp_size: int) -> BatchRules:
        """Those of a run, whose configuration has been checked for that many ranks."""
        parallel = config.parallel
        return cls(
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            dp_size=dp_size,
            packing=config.data.packing,
            max_length=config.micro_batch_shape[1],
            num_image_tokens=config.vision.num_image_tokens,
            multiple_of=parallel.tensor if parallel.sequence_parallel else 1,
            pads_to_max=config.data.padding == "sequence_length",
            rows_multiple_of=config.micro_batches_multiple_of,
            seed=config.train.seed,
        )

    def step(self, samples: Sequence[SampleShape]) -> Step:
        """The micro-batches of all ranks.

        Args:
            samples: Of one step, in the order of the run.
        """
        assert len(samples) == self.global_batch_size, (len(samples), self.global_batch_size)
        size, ranks = self.micro_batch_size, self.dp_size
        assert len(samples) % (size * ranks) == 0, (len(samples), size, ranks)
        portions = [samples[i : i + size] for i in range(0, len(samples), size)]
        read = [portions[rank::ranks] for rank in range(ranks)]  # data/stream/sampler.py
        if not self.packing:
            return tuple(
                tuple(self.micro_batch([(one,) for one in portion]) for portion in own)
                for own in read
            )
        gathered = [one for own in read for portion in own for one in portion]
        dealt = deal_rows(
            [one.tokens for one in gathered],
            [one.images for one in gathered],
            num_ranks=ranks,
            capacity=self.max_length,
            num_image_tokens=self.num_image_tokens,
            rows_multiple_of=self.rows_multiple_of,
        )
        return tuple(
            tuple(self.micro_batch([tuple(gathered[i] for i in row)]) for row in own)
            for own in dealt
        )

    def micro_batch(self, rows: Sequence[tuple[SampleShape, ...]]) -> MicroBatchShape:
        """The micro-batch of these rows, padded as in training."""
        longest = max(sum(one.tokens for one in row) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        return MicroBatchShape(tuple(rows), self.max_length if self.pads_to_max else length)


@dataclass(frozen=True)
class DrawnSteps:
    """Steps of a run, one or more."""

    steps: tuple[Step, ...]

    @classmethod
    def alike(cls, workload: Workload, dp_size: int) -> DrawnSteps:
        """One step in which all data-parallel ranks have the same micro-batches."""
        return cls(((workload.micro_batches,) * dp_size,))

    @property
    def micro_batches(self) -> Iterator[MicroBatchShape]:
        return (one for step in self.steps for own in step for one in own)

    @property
    def padding_fraction(self) -> float:
        """Padding per position."""
        positions, tokens = np.array([(b.positions, b.tokens) for b in self.micro_batches]).sum(0)
        return float(1 - tokens / positions)

    @property
    def positions_per_step(self) -> float:
        """Tokens with padding, on all ranks."""
        return sum(one.positions for one in self.micro_batches) / len(self.steps)

    @property
    def tokens_per_step(self) -> float:
        """Tokens without padding, on all ranks."""
        return sum(one.tokens for one in self.micro_batches) / len(self.steps)

    @property
    def images_per_step(self) -> float:
        """Images on all ranks."""
        return sum(one.images for one in self.micro_batches) / len(self.steps)


@lru_cache(maxsize=32)  # layouts of one search share their data-parallel sizes
def draw_steps(rules: BatchRules, report: DataReport) -> DrawnSteps:
    """The first steps of a run: whole epochs, unless an epoch is long."""
    pool = SamplePool(report, rules.seed)
    size = rules.global_batch_size
    limit = min(_MAX_STEPS, max(_MIN_STEPS, _MAX_SAMPLES // size))
    epochs = limit * size // pool.epoch_size
    count = -(-epochs * pool.epoch_size // size) or limit
    return DrawnSteps(tuple(rules.step(pool.draw(n * size, size)) for n in range(count)))
