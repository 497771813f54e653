"""Rotary position embedding of queries or keys, in fp32.

A position's angles are ``freqs[position]``.  Formats: ``sbhd`` and ``bshd`` count positions along
s; in ``thd`` they start anew in every segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.te.standin.enums import NVTE_QKV_Format


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """``(..., h, d)`` rotated; ``freqs`` is ``(s, 1, 1, r)`` with r <= d."""
    _only_plain(start_positions, interleaved, cp_size)
    angles = _angles(input, freqs, qkv_format, cu_seqlens)
    turned, rest = input.split((freqs.shape[-1], input.shape[-1] - freqs.shape[-1]), dim=-1)
    turned = turned.float() * angles.cos() + _half_turned(turned.float()) * angles.sin()
    return torch.cat((turned.to(input.dtype), rest), dim=-1)


def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """The gradient is turned back."""
    return fused_rope_forward(
        output_grads,
        -freqs,
        start_positions,
        qkv_format,
        interleaved,
        cu_seqlens,
        cp_size,
        cp_rank,
    )


def _half_turned(x: Tensor) -> Tensor:
    """The second half with its sign changed, then the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _angles(x: Tensor, freqs: Tensor, qkv_format: int, cu_seqlens: Tensor | None) -> Tensor:
    """Angles that can be multiplied with x."""
    if qkv_format == NVTE_QKV_Format.NVTE_SBHD:
        return freqs[: x.shape[0]]
    if qkv_format == NVTE_QKV_Format.NVTE_BSHD:
        return freqs[: x.shape[1]].transpose(0, 1)
    assert qkv_format == NVTE_QKV_Format.NVTE_THD and cu_seqlens is not None
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([freqs[:length, 0] for length in lengths])


def _only_plain(start_positions: Tensor | None, interleaved: bool, cp_size: int) -> None:
    if start_positions is not None or interleaved or cp_size != 1:
        raise NotImplementedError("Only the plain rotary embedding has a stand-in.")
