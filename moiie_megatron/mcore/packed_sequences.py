"""Packed rows as Megatron-Core passes them to its attention: the ``thd`` format.

Shapes: k segments of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from moiie_megatron.mcore.device import Device, has_transformer_engine


@dataclass
class Segments(PackedSeqParams):
    """Megatron's parameters and the lengths on the host.

    Attributes:
        lengths: Tokens of every segment, in order.
    """

    lengths: tuple[int, ...] = ()


def segments_of(cu_seqlens: Tensor, device: Device) -> Segments:
    """What every pipeline stage needs of a packed row.

    Transformer Engine's kernels read the boundaries on the GPU.  Our attention and Megatron's
    unfused rotary embedding read them on the host, where they stay: nobody waits for the device.

    Args:
        cu_seqlens: int32 ``(k + 1,)`` on the CPU, from 0 to the length of the row.
    """
    lengths = tuple(cu_seqlens.diff().tolist())
    if has_transformer_engine(device):
        cu_seqlens = cu_seqlens.to(device.torch_device, non_blocking=True)
    longest = max(lengths)
    return Segments(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
    )
