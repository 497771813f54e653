"""What pipeline stages tell each other in a pass: hidden states forward, chosen tokens to all.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.inference.communication_utils import (
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
from torch import Tensor

from moiie_megatron.mcore.parallel import ParallelContext


def receive_hidden(shape: tuple[int, ...], dtype: torch.dtype, context: ParallelContext) -> Tensor:
    """Hidden states of the previous stage; not to be called on the first one."""
    received = torch.empty(shape, dtype=dtype, device=context.device.torch_device)
    recv_from_prev_pipeline_rank_(received, context.groups.pp)
    return received


def send_hidden(hidden: Tensor, context: ParallelContext) -> None:
    """Hidden states to the next stage; not to be called on the last one."""
    send_to_next_pipeline_rank(hidden.contiguous(), context.groups.pp)


def from_last_stage(tensor: Tensor, context: ParallelContext) -> Tensor:
    """The tensor that the first tensor-parallel rank of the last stage has, on all of a replica.

    Args:
        tensor: On other ranks anything of the same shape and dtype; overwritten.
    """
    group = context.groups.mp
    if group.size() > 1 and tensor.numel():
        last = group.size() - context.groups.tp.size()  # tensor-parallel ranks are neighbours
        dist.broadcast(tensor, src=dist.get_global_rank(group, last), group=group)
    return tensor


def any_replica(value: bool, context: ParallelContext) -> bool:
    """Whether it is true on any data-parallel rank; a collective."""
    if context.dp_size == 1:
        return value
    flag = torch.tensor([int(value)], device=context.device.torch_device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=context.groups.dp)
    return bool(flag.item())


def from_rank_0(number: int, context: ParallelContext) -> int:
    """The number that rank 0 of the job has, on all ranks; a collective."""
    tensor = torch.tensor(number, device=context.device.torch_device)
    dist.broadcast(tensor, src=0)
    return int(tensor)
