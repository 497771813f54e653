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


def small_files_only(rank: int) -> None:
    """Files cannot grow beyond 100 kB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
