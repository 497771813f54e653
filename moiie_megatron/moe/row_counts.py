"""How many rows each rank sends and receives: exchanged on the device, read late by the host.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


@dataclass(frozen=True)
class DispatchSplits:
    """Row counts of one dispatch, on the host.

    Attributes:
        input_splits: Rows that this rank sends to each expert-parallel rank.
        output_splits: Rows that it receives from each expert-parallel rank.
        etp_splits: Rows that each of its expert-tensor-parallel ranks receives.
        tokens_per_expert: int64 ``(L,)`` on the CPU, rows of each local expert.
    """

    input_splits: list[int]
    output_splits: list[int]
    etp_splits: list[int]
    tokens_per_expert: Tensor


class RowCounts:
    """The row counts of one dispatch on their way to the host.

    All-to-all needs its sizes on the host.  They are copied on a stream of their own, beside the
    kernels that are started after this; ``splits`` waits for that copy alone.

    Args:
        rows_N: int64, rows that this rank sends to each expert-parallel rank.
        tokens_P: int64, how many of its tokens have chosen each expert.
        groups: Megatron's process groups.
    """

    def __init__(self, rows_N: Tensor, tokens_P: Tensor, groups: ProcessGroupCollection) -> None:
        self._groups = groups
        self._num_local_experts = len(tokens_P) // len(rows_N)
        counts = torch.cat([rows_N, tokens_P])
        if groups.tp_ep.size() > 1:
            counts = gather_counts(counts, groups.tp_ep)
        stream = _copy_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._counts = maybe_move_tensor_to_cpu(counts, record_stream=True)
            self._copied = stream.record_event()

    @cached_property
    def splits(self) -> DispatchSplits:
        """The counts.  The first access is the MoE layer's only host sync."""
        self._copied.synchronize()
        groups = self._groups
        ep_rank, ep_size = groups.ep.rank(), groups.ep.size()
        counts = self._counts.view(ep_size, groups.expt_tp.size(), -1)
        rows = counts[:, :, :ep_size]  # (from rank, from expert-tensor rank, to rank)
        first = ep_size + ep_rank * self._num_local_experts
        local = counts.narrow(2, first, self._num_local_experts)
        return DispatchSplits(
            input_splits=rows[ep_rank, groups.expt_tp.rank()].tolist(),
            output_splits=rows[:, groups.expt_tp.rank(), ep_rank].tolist(),
            etp_splits=rows[:, :, ep_rank].sum(dim=0).tolist(),
            tokens_per_expert=local.sum(dim=(0, 1)),
        )


def gather_counts(counts: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The counts of all ranks of the group, one after the other."""
    gathered = counts.new_empty(group.size() * counts.numel())
    torch.distributed.all_gather_into_tensor(gathered, counts, group=group)
    return gathered


def _copy_stream() -> torch.cuda.Stream:
    """Megatron's stream for copies to the host, one per process."""
    owner = MoEAlltoAllTokenDispatcher
    if owner.cuda_dtoh_stream is None:
        owner.cuda_dtoh_stream = torch.cuda.Stream()
    stream: torch.cuda.Stream = owner.cuda_dtoh_stream
    return stream
