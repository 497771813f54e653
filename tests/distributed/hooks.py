"""What is made to go wrong inside a rank, before it trains (``start_ranks``)."""

from __future__ import annotations

import resource
from typing import Any

import torch

POISONED_STEP = 3
MICRO_BATCHES = 2  # per step and rank


def poison_rank_1(rank: int) -> None:
    """The pictures of rank 1's second micro-batch of step 3 become NaN."""
    if rank != 1:
        return
    from moiie_megatron.training import step

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
