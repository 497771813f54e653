"""Packed rows in the form that Megatron-Core's attention takes: the ``thd`` format.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from moiie_megatron.mcore.device import Device


@dataclass
class Segments(PackedSeqParams):
    """Megatron's parameters of a packed row, with the lengths as plain numbers.

    Attributes:
        lengths: Tokens of every segment, in order.
    """

    lengths: tuple[int, ...] = ()


def segments_of(cu_seqlens: Tensor, device: Device) -> Segments:
    """The segments of a packed row, from their boundaries.

    Transformer Engine's kernels read the boundaries on the GPU.  ``SDPACoreAttention`` and
    Megatron's unfused rotary embedding read them on the CPU, where they stay then: no host sync.

    Args:
        cu_seqlens: int32 ``(c + 1,)`` on the CPU, from 0 to the length of the row.
        device: Where the model runs.
    """
    lengths = tuple(cu_seqlens.diff().tolist())
    if device.transformer_engine:
        cu_seqlens = device.copy(cu_seqlens)
    longest = max(lengths)
    return Segments(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
    )
