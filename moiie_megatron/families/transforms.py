"""Tensor surgery between Hugging Face's layouts and Megatron's: pure functions, exact inverses.

Every weight is ``(out, in)``.  Shapes: h hidden, d head size, n heads, g query groups (key/value
heads), r = n / g heads per group, f FFN size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> Tensor:
        """A tensor without data: what surgery makes of it shows what it makes of the real one."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class WeightTransform:
    """How one Megatron tensor is made of Hugging Face tensors, and taken apart again."""

    to_megatron: Callable[[Sequence[Tensor]], Tensor]
    to_hf: Callable[[Tensor], tuple[Tensor, ...]]


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """Megatron's ``linear_qkv``: for each query group its r query heads, its key, its value.

    Args:
        q: ``(n d, h)``.
        k: ``(g d, h)``.
        v: ``(g d, h)``.

    Returns:
        ``(g (r + 2) d, h)``.
    """
    grouped = [part.reshape(num_groups, -1, part.shape[-1]) for part in (q, k, v)]
    return torch.cat(grouped, dim=1).reshape(-1, q.shape[-1])


def split_qkv(qkv: Tensor, num_heads: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``fuse_qkv``."""
    heads = num_heads // num_groups
    per_group = qkv.reshape(num_groups, heads + 2, -1, qkv.shape[-1])
    q, k, v = torch.split(per_group, [heads, 1, 1], dim=1)
    hidden = qkv.shape[-1]
    return q.reshape(-1, hidden), k.reshape(-1, hidden), v.reshape(-1, hidden)


def fuse_stacked_qkv(stacked: Tensor, num_heads: int, num_groups: int) -> Tensor:
    """Phi-3's ``qkv_proj``, rows ``[q | k | v]``, as Megatron's ``linear_qkv``."""
    size = stacked.shape[0] // (num_heads + 2 * num_groups)
    q, k, v = torch.split(stacked, [num_heads * size, num_groups * size, num_groups * size])
    return fuse_qkv(q, k, v, num_groups)


def split_stacked_qkv(qkv: Tensor, num_heads: int, num_groups: int) -> Tensor:
    """The inverse of ``fuse_stacked_qkv``."""
    return torch.cat(split_qkv(qkv, num_heads, num_groups))


def fuse_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Megatron's ``linear_fc1`` (and Phi-3's ``gate_up_proj``): rows ``[gate | up]``.

    Args:
        gate: ``(f, h)``.
        up: ``(f, h)``.

    Returns:
        ``(2 f, h)``.
    """
    return torch.cat((gate, up))


def split_gate_up(fc1: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``fuse_gate_up``."""
    gate, up = fc1.chunk(2)
    return gate, up


def same() -> WeightTransform:
    """One tensor on both sides."""
    return WeightTransform(lambda parts: parts[0], lambda full: (full,))


def qkv(num_heads: int, num_groups: int) -> WeightTransform:
    """q_proj, k_proj, v_proj <-> linear_qkv."""
    return WeightTransform(
        lambda parts: fuse_qkv(parts[0], parts[1], parts[2], num_groups),
        lambda full: split_qkv(full, num_heads, num_groups),
    )


def stacked_qkv(num_heads: int, num_groups: int) -> WeightTransform:
    """qkv_proj <-> linear_qkv."""
    return WeightTransform(
        lambda parts: fuse_stacked_qkv(parts[0], num_heads, num_groups),
        lambda full: (split_stacked_qkv(full, num_heads, num_groups),),
    )


def gate_up() -> WeightTransform:
    """gate_proj, up_proj <-> linear_fc1."""
    return WeightTransform(lambda parts: fuse_gate_up(*parts), split_gate_up)
