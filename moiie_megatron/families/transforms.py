"""Tensors from Hugging Face's layout to Megatron's and back: pure functions, exact inverses.

Every weight is ``(out, in)``, every bias ``(out,)``.  Shapes: h hidden size, d head size, n
attention heads, g query groups (key/value heads), r = n / g heads per group, f FFN size.

torch is imported when a function is called: the tables of ``families/`` refer to these functions
and are read on machines without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
        """A tensor without data: its transform has the shape and dtype of the real one's."""
        import torch

        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class WeightTransform:
    """How one Megatron tensor is made of Hugging Face tensors, and split into them again.

    Args:
        to_megatron: The Hugging Face tensors in the order of the table to the Megatron tensor.
        to_hf: The exact inverse.
    """

    to_megatron: Callable[[Sequence[Tensor]], Tensor]
    to_hf: Callable[[Tensor], tuple[Tensor, ...]]


def same() -> WeightTransform:
    """One tensor with one layout on both sides."""
    return WeightTransform(lambda parts: parts[0], lambda full: (full,))


def qkv(num_heads: int, num_groups: int) -> WeightTransform:
    """Three projections, or their biases, and Megatron's ``linear_qkv``.

    Hugging Face: ``q_proj`` ``(n d, h)``, ``k_proj`` ``(g d, h)``, ``v_proj`` ``(g d, h)``, each
    with its heads one below the other.  Biases are the same without h.

    Megatron: one tensor ``(g (r + 2) d, h)``.  Its rows are sorted by query group: the r query
    heads of the group, its key head, its value head.  Cutting the rows into equal parts gives
    every tensor-parallel rank whole groups.

    Example with n = 4 heads in g = 2 groups (r = 2), d rows per head::

        q_proj  q0 q1 q2 q3
        k_proj  k0 k1            linear_qkv  q0 q1 k0 v0 | q2 q3 k1 v1
        v_proj  v0 v1
    """
    return WeightTransform(
        lambda parts: fuse_qkv(parts[0], parts[1], parts[2], num_groups),
        lambda full: split_qkv(full, num_heads, num_groups),
    )


def stacked_qkv(num_heads: int, num_groups: int) -> WeightTransform:
    """One projection with all queries, then all keys, then all values, and ``linear_qkv``.

    Hugging Face: ``qkv_proj`` ``((n + 2 g) d, h)``, the rows ``[q | k | v]``.

    Megatron: as in ``qkv``.

    Example with n = 4 heads in g = 2 groups, d rows per head::

        qkv_proj  q0 q1 q2 q3 k0 k1 v0 v1      linear_qkv  q0 q1 k0 v0 | q2 q3 k1 v1
    """
    return WeightTransform(
        lambda parts: fuse_stacked_qkv(parts[0], num_heads, num_groups),
        lambda full: (split_stacked_qkv(full, num_heads, num_groups),),
    )


def gate_up() -> WeightTransform:
    """The two input projections of a gated FFN and Megatron's ``linear_fc1``.

    Hugging Face: ``gate_proj`` ``(f, h)`` and ``up_proj`` ``(f, h)``.

    Megatron: one tensor ``(2 f, h)``, the rows ``[gate | up]``; the FFN computes
    ``silu(x gate) * (x up)``.  A tensor-parallel rank holds the same rows of both halves, so
    checkpoints cut the two halves separately.

    Example with f = 3::

        gate_proj  g0 g1 g2
        up_proj    u0 u1 u2      linear_fc1  g0 g1 g2 u0 u1 u2
    """
    return WeightTransform(lambda parts: fuse_gate_up(*parts), split_gate_up)


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, num_groups: int) -> Tensor:
    """``linear_qkv`` from its three parts, see ``qkv``.

    Args:
        q: ``(n d, h)``, or a bias ``(n d,)``.
        k: ``(g d, h)``, or ``(g d,)``.
        v: ``(g d, h)``, or ``(g d,)``.

    Returns:
        ``(g (r + 2) d, h)``, or ``(g (r + 2) d,)``.
    """
    import torch

    grouped = [part.reshape(num_groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(grouped, dim=1).reshape(-1, *q.shape[1:])


def split_qkv(qkv: Tensor, num_heads: int, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``fuse_qkv``."""
    import torch

    rest, heads = qkv.shape[1:], num_heads // num_groups
    size = qkv.shape[0] // (num_heads + 2 * num_groups)
    per_group = qkv.reshape(num_groups, heads + 2, size, *rest)
    q, k, v = torch.split(per_group, [heads, 1, 1], dim=1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def fuse_stacked_qkv(stacked: Tensor, num_heads: int, num_groups: int) -> Tensor:
    """``linear_qkv`` from rows ``[q | k | v]``, see ``stacked_qkv``.

    Args:
        stacked: ``((n + 2 g) d, h)``.

    Returns:
        ``(g (r + 2) d, h)``.
    """
    import torch

    size = stacked.shape[0] // (num_heads + 2 * num_groups)
    q, k, v = torch.split(stacked, [num_heads * size, num_groups * size, num_groups * size])
    return fuse_qkv(q, k, v, num_groups)


def split_stacked_qkv(qkv: Tensor, num_heads: int, num_groups: int) -> Tensor:
    """The inverse of ``fuse_stacked_qkv``."""
    import torch

    return torch.cat(split_qkv(qkv, num_heads, num_groups))


def fuse_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """``linear_fc1`` from its two halves, see ``gate_up``.

    Args:
        gate: ``(f, h)``.
        up: ``(f, h)``.

    Returns:
        ``(2 f, h)``.
    """
    import torch

    return torch.cat((gate, up))


def split_gate_up(fc1: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``fuse_gate_up``."""
    gate, up = fc1.chunk(2)
    return gate, up
