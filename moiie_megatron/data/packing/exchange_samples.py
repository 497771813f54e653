"""Send samples to the data-parallel ranks whose rows they are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.flat_item import from_bytes, to_bytes


class DataParallelRanks(Protocol):
    """The data-parallel ranks, as one of them sees them (``ParallelContext``)."""

    @property
    def dp_rank(self) -> int:
        """The rank of this process, from 0."""

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""

    def gather_over_dp(self, numbers: Tensor) -> Tensor:
        """The int64 tensors of all ranks, stacked in the order of the ranks; a collective.

        Args:
            numbers: On the CPU, of the same shape on all ranks.
        """

    def exchange_over_dp(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What every rank has sent to this one; a collective.

        Args:
            parts: For every rank, uint8 (bytes,) on the CPU.
        """


def exchange_samples(
    examples: Sequence[Example], plan: Sequence[Sequence[Sequence[int]]], ranks: DataParallelRanks
) -> list[list[Example]]:
    """The samples of this rank's rows; every rank calls this.

    Args:
        examples: What this rank has read, equally many on every rank.
        plan: For every rank its rows, each the indices of its samples: sample j of rank r has
            index r * len(examples) + j.
        ranks: All ranks.
    """
    own, count = ranks.dp_rank, len(examples)

    def owned_by(rank: int, rows: Sequence[Sequence[int]]) -> list[int]:
        return [i for row in rows for i in row if i // count == rank]

    nothing = torch.empty(0, dtype=torch.uint8)
    parts = [
        nothing if rank == own else to_bytes([examples[i % count] for i in owned_by(own, rows)])
        for rank, rows in enumerate(plan)
    ]
    found = {i: examples[i % count] for i in owned_by(own, plan[own])}
    for rank, part in enumerate(ranks.exchange_over_dp(parts)):
        if rank != own:
            found |= zip(owned_by(rank, plan[own]), from_bytes(part), strict=True)
    return [[found[i] for i in row] for row in plan[own]]
