"""Copy rows to their destinations and add the copies up again: permute and unpermute.

Each is the gradient of the other.  Both only gather (``index_select`` and ``embedding_bag``), so
nothing is scattered, sums have a fixed order, and the CPU uses all its threads.

    mask_RZ    Z=0  Z=1  Z=2       permute: copies by destination, then by row
    row a       x    .    x
    row b       .    .    .        copy           0    1    2    3
    row c       x    x    .        of row         a    c    c    a
                                   destination    0    0    1    2

    unpermute adds up the copies of each row: a = copy 0 + copy 3, b = 0, c = copy 1 + copy 2

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowPermutation:
    """The row of each copy, and the copies of each row.

    In the example above: ``row_X = [0, 2, 2, 0]``, ``place_X = [0, 2, 5, 6]``,
    ``copies_by_row_X = [0, 3, 1, 2]``, ``start_R = [0, 2, 2]``.

    Attributes:
        mask_RZ: bool, True where a destination gets a copy of a row.
        max_copies_per_row: Upper bound on the copies of any row.
        row_X: Row of every copy.
        place_X: Place of every copy in the mask read column by column.
        copies_by_row_X: The copies of row 0, then those of row 1, and so on.
    """

    mask_RZ: Tensor
    max_copies_per_row: int
    row_X: Tensor
    place_X: Tensor
    copies_by_row_X: Tensor

    @classmethod
    def from_mask(cls, mask_RZ: Tensor, num_copies: int, max_copies_per_row: int) -> RowPermutation:
        """One copy per True element, ordered by destination, then by row.  No host sync.

        Args:
            mask_RZ: bool, True where a destination gets a copy of a row.
            num_copies: Number of True elements.  With another number the copies are wrong, but
                none is outside the mask.
            max_copies_per_row: Upper bound on the copies of any row.
        """
        num_rows, num_destinations = mask_RZ.shape
        mask_ZR = mask_RZ.t().contiguous()
        place_X = torch.nonzero_static(mask_ZR.view(-1), size=num_copies, fill_value=0).view(-1)
        # For every place the number of copies up to it, then the places read row by row.
        up_to_RZ = mask_ZR.view(-1).cumsum(0).view(num_destinations, num_rows).t().reshape(-1)
        by_row_X = torch.nonzero_static(mask_RZ.reshape(-1), size=num_copies, fill_value=0)
        return cls(
            mask_RZ,
            max_copies_per_row,
            row_X=place_X % max(num_rows, 1),
            place_X=place_X,
            copies_by_row_X=up_to_RZ.index_select(0, by_row_X.view(-1)) - 1,
        )

    @property
    def in_pairs(self) -> bool:
        """Whether every row has exactly two copies."""
        return self.max_copies_per_row == 2 and len(self.row_X) == 2 * len(self.mask_RZ)

    @cached_property
    def start_R(self) -> Tensor:
        """Where the copies of each row start in ``copies_by_row_X``."""
        copies_R = self.mask_RZ.sum(dim=1)
        return copies_R.cumsum(0) - copies_R

    def values(self, values_RZ: Tensor) -> Tensor:
        """The value of every copy, ``(R, Z, ...)`` to ``(X, ...)``."""
        return values_RZ.transpose(0, 1).flatten(0, 1).index_select(0, self.place_X)

    def permute(self, rows_RD: Tensor) -> Tensor:
        """Copy rows to their destinations: ``(R, D)`` to ``(X, D)``."""
        copies_XD: Tensor = _Permute.apply(rows_RD, self)
        return copies_XD

    def unpermute(self, copies_XD: Tensor) -> Tensor:
        """Add up the copies of every row: ``(X, D)`` to ``(R, D)``; 0 for rows without copies."""
        rows_RD: Tensor = _Unpermute.apply(copies_XD, self)
        return rows_RD

    def sum_copies(self, copies_XD: Tensor) -> Tensor:
        """``unpermute`` without autograd; sums are taken in fp32 and rounded once."""
        if not len(self.copies_by_row_X):
            return copies_XD.new_zeros(len(self.mask_RZ), copies_XD.shape[1])
        if self.in_pairs and copies_XD.dtype != torch.float32:  # a sum of two is rounded once
            first, second = self.copies_by_row_X.view(-1, 2).t()
            return copies_XD.index_select(0, first).add_(copies_XD.index_select(0, second))
        # In fp32, because the CPU kernel for bf16 rounds ties away from zero, while an addition
        # in bf16 rounds them to even.
        sums_RD = F.embedding_bag(self.copies_by_row_X, copies_XD.float(), self.start_R, mode="sum")
        return sums_RD.to(copies_XD.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, permutation: RowPermutation) -> Tensor:
        ctx.permutation = permutation
        return rows_RD.index_select(0, permutation.row_X)

    @staticmethod
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None]:
        return ctx.permutation.sum_copies(grad_XD.contiguous()), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies_XD: Tensor, permutation: RowPermutation) -> Tensor:
        ctx.permutation = permutation
        return permutation.sum_copies(copies_XD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return grad_RD.index_select(0, ctx.permutation.row_X), None
