"""Copying rows to several places and adding the copies up again: two dual operations.

Each is the other's gradient and both only gather (``index_select`` and ``embedding_bag``), so
nothing is scattered, sums have a fixed order, and the CPU uses all its threads.

Shapes: R rows, G groups that rows are copied to, X copies of rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowPermutation:
    """Which row each copy is of, and where the copies of each row are.

    Attributes:
        row_X: Row of every copy.
        group_X: Group of every copy.
        order_X: Copies sorted by row.
        start_R: Where the copies of each row start in ``order_X``.
        in_pairs: Every row has exactly two copies.
    """

    row_X: Tensor
    group_X: Tensor
    order_X: Tensor
    start_R: Tensor
    in_pairs: bool

    @classmethod
    def from_mask(cls, mask_RG: Tensor, count: int, most: int) -> RowPermutation:
        """One copy per True element, ordered by group, then by row; the device is not asked.

        Args:
            mask_RG: bool, which groups get a copy of a row.
            count: Number of True elements, known on the host.
            most: What no row has more copies than.
        """
        rows, groups = mask_RG.shape
        group_X, row_X = torch.nonzero_static(mask_RG.t(), size=count).t().contiguous()
        # How many copies come before a (row, group) when read row by row.
        flat = mask_RG.reshape(-1)
        before = flat.cumsum(0) - flat.long()
        place_X = before.index_select(0, row_X * groups + group_X)
        number_X = torch.arange(count, device=mask_RG.device)
        order_X = torch.empty_like(number_X).scatter_(0, place_X, number_X)
        return cls(
            row_X, group_X, order_X, before[::groups].contiguous(), most == 2 and count == 2 * rows
        )

    def expand(self, rows_RD: Tensor) -> Tensor:
        """Copy rows: ``(R, D)`` to ``(X, D)``."""
        copies: Tensor = _Permute.apply(rows_RD, self)
        return copies

    def reduce(self, copies_XD: Tensor) -> Tensor:
        """Add up the copies of every row: ``(X, D)`` to ``(R, D)``; 0 where there are none."""
        rows: Tensor = _Unpermute.apply(copies_XD, self)
        return rows

    def sums(self, copies_XD: Tensor) -> Tensor:
        """``reduce`` without gradient, in fp32 and rounded once."""
        if not len(self.order_X) or not len(self.start_R):
            return copies_XD.new_zeros(len(self.start_R), copies_XD.shape[1])
        if self.in_pairs and copies_XD.dtype != torch.float32:  # a sum of two is rounded once
            first, second = self.order_X.view(-1, 2).t()
            return copies_XD.index_select(0, first).add_(copies_XD.index_select(0, second))
        # The CPU kernel for bf16 rounds ties away from zero, unlike the addition that this
        # stands for.
        sums = F.embedding_bag(self.order_X, copies_XD.float(), self.start_R, mode="sum")
        return sums.to(copies_XD.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: RowPermutation) -> Tensor:
        ctx.copies = copies
        return rows.index_select(0, copies.row_X)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.sums(grad.contiguous()), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, copies: RowPermutation) -> Tensor:
        ctx.copies = copies
        return copies.sums(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.copies.row_X), None
