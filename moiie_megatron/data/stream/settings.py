"""How a data-parallel rank reads its part of the run's samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LoaderSettings:
    """Batch sizes, the position of a rank, and how its samples are read.

    The configuration has been checked against the number of ranks (``config/validate.py``).

    Attributes:
        seed: Decides the order of samples and which sample replaces a skipped one.
        global_batch_size: Samples per step on all ranks together.
        micro_batch_size: Samples per micro-batch.
        dp_rank: This data-parallel rank, from 0.
        dp_size: Number of data-parallel ranks.
        consumed_samples: Samples that earlier steps have used, on all ranks together; 0 at the
            start of a run.
        num_workers: Processes that read ahead; 0 reads in this process.
        num_steps: Steps to yield; None is endless.
        pin_memory: Put batches into pinned memory, from which copies to a GPU are asynchronous.
        max_skipped_fraction: Decides how many skipped samples in a row stop the run, 0..1.
        is_stopping: Whether the run should stop, so that it does not wait for its samples for ever.
        start_method: How worker processes start (fork, spawn, forkserver); None is Python's
            default.
    """

    seed: int
    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    consumed_samples: int = 0
    num_workers: int = 0
    num_steps: int | None = None
    pin_memory: bool = False
    max_skipped_fraction: float = 0.01
    is_stopping: Callable[[], bool] = bool  # False
    start_method: str | None = None

    def __post_init__(self) -> None:
        assert self.global_batch_size > 0 and self.consumed_samples >= 0
        assert self.global_batch_size % (self.micro_batch_size * self.dp_size) == 0
        assert 0 <= self.dp_rank < self.dp_size

    @property
    def samples_per_step(self) -> int:
        """Samples of this rank in a step."""
        return self.global_batch_size // self.dp_size

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of this rank in a step, before packing."""
        return self.samples_per_step // self.micro_batch_size
