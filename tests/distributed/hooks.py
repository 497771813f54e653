"""What is made to go wrong inside a rank, before it trains (``start_ranks``)."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import torch

POISONED_STEP = 3
LATE_STEP = 5
DELAY = 1.0  # seconds
MICRO_BATCHES = 2  # per step and rank


def poison_rank_1(rank: int) -> None:
    """The pictures of rank 1's second micro-batch of step 3 become NaN; its data of step 5 are
    late."""
    if rank != 1:
        return
    from moiie_megatron.training import run, step

    build = run.build_train_loader

    def build_train_loader(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batches in enumerate(build(*args, **kwargs), start=1):
            time.sleep(DELAY if number == LATE_STEP else 0.0)
            yield batches

    run.build_train_loader = build_train_loader

    original, calls = step.forward_inputs, iter(range(1, 1000))

    def forward_inputs(*args: Any) -> dict[str, Any]:
        inputs = original(*args)
        if next(calls) == POISONED_STEP * MICRO_BATCHES:
            inputs["images"] = torch.full_like(inputs["images"], torch.nan)
        return inputs

    step.forward_inputs = forward_inputs


def gather_another_dtype(rank: int) -> None:
    """Rank 1 gathers integers where the others gather floats; Gloo moves bytes of any dtype."""
    import torch.distributed as dist

    from moiie_megatron.evaluation import layout_equivalence

    original = layout_equivalence.record_step

    def record_step(*args: Any) -> Any:
        ours = torch.ones(2, dtype=torch.int32 if rank == 1 else torch.float32)
        dist.all_gather([torch.empty_like(ours) for _ in range(dist.get_world_size())], ours)
        return original(*args)

    layout_equivalence.record_step = record_step


def small_files_only(rank: int) -> None:
    """Files cannot grow beyond 100 kB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
