"""Peak memory of the GPUs, for the log."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moiie_megatron.mcore.parallel import ParallelContext

GIB = 2**30


def peak_memory(context: ParallelContext) -> dict[str, float]:
    """The most memory that any rank's GPU has used since the call before; a collective on GPUs.

    Returns:
        ``memory_allocated_gib`` (tensors) and ``memory_reserved_gib`` (what torch's allocator
        holds for them); empty on the CPU.
    """
    if not context.device.is_cuda:
        return {}
    peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    torch.cuda.reset_peak_memory_stats()
    largest = torch.tensor(peaks, device=context.device.torch_device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    allocated, reserved = largest.tolist()
    return {"memory_allocated_gib": allocated / GIB, "memory_reserved_gib": reserved / GIB}
