"""Copying rows to several places and adding the copies up again: two dual operations.

Each is the other's gradient and both only gather (``index_select`` and ``embedding_bag``), so
nothing is scattered, sums have a fixed order, and the CPU uses all its threads.

Shapes: R rows, X copies of rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def positions_of(mask: Tensor, count: int) -> Tensor:
    """Indices of the True elements, in order, without asking the device how many there are.

    Args:
        mask: bool, one axis.
        count: Number of True elements, known on the host.
    """
    places = mask.cumsum(0) - 1
    # False elements all go to one extra place at the end, which is cut off.
    places = torch.where(mask, places, count)
    found = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    indices = torch.arange(mask.numel(), device=mask.device)
    return found.scatter_(0, places, indices)[:count]


@dataclass(frozen=True)
class Copies:
    """Which row each copy is of, and where the copies of each row are.

    Attributes:
        row_X: Row of every copy.
        order_X: Copies sorted by row.
        start_R: Where the copies of each row start in ``order_X``.
    """

    row_X: Tensor
    order_X: Tensor
    start_R: Tensor

    @classmethod
    def from_mask(cls, mask_GR: Tensor, count: int) -> Copies:
        """One copy per True element of ``(groups, rows)``, ordered by group, then by row."""
        groups, rows = mask_GR.shape
        row_X = positions_of(mask_GR.reshape(-1), count) % max(rows, 1)
        mask_RG = mask_GR.t()
        # Copy number of every (group, row), read in row-major order.
        number_GR = (mask_GR.reshape(-1).cumsum(0) - 1).view(groups, rows)
        slots_X = positions_of(mask_RG.reshape(-1), count)
        order_X = number_GR.t().reshape(-1).index_select(0, slots_X)
        per_row = mask_RG.sum(dim=1)
        return cls(row_X, order_X, per_row.cumsum(0) - per_row)

    def expand(self, rows_RD: Tensor) -> Tensor:
        """Copy rows: ``(R, D)`` to ``(X, D)``."""
        return _Expand.apply(rows_RD, self.row_X, self.order_X, self.start_R)

    def reduce(self, copies_XD: Tensor) -> Tensor:
        """Add up the copies of every row: ``(X, D)`` to ``(R, D)``; 0 where there are none."""
        return _Reduce.apply(copies_XD, self.row_X, self.order_X, self.start_R)


def _sum_copies(copies_XD: Tensor, order_X: Tensor, start_R: Tensor) -> Tensor:
    if not len(order_X) or not len(start_R):
        return copies_XD.new_zeros(len(start_R), copies_XD.shape[1])
    # In fp32 and rounded once: the CPU kernel for bf16 rounds ties away from zero, unlike the
    # addition that this stands for.
    sums = F.embedding_bag(order_X, copies_XD.float(), start_R, mode="sum")
    return sums.to(copies_XD.dtype)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_X: Tensor, order_X: Tensor, start_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_X, start_R)
        return rows.index_select(0, row_X)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_copies(grad.contiguous(), *ctx.saved_tensors), None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, copies: Tensor, row_X: Tensor, order_X: Tensor, start_R: Tensor
    ) -> Tensor:
        ctx.save_for_backward(row_X)
        return _sum_copies(copies, order_X, start_R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (row_X,) = ctx.saved_tensors
        return grad.index_select(0, row_X), None, None, None
