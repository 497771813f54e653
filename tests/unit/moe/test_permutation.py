"""Copying rows to destinations and adding the copies up: by hand, and for any mask.

The example by hand, three tokens and three destinations:

    mask_RZ    Z=0  Z=1  Z=2       copies, by destination, then by row
    row a       x    .    x
    row b       .    .    .        copy           0    1    2    3
    row c       x    x    .        of row         a    c    c    a
                                   destination    0    0    1    2
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiie_megatron.moe.permutation import RowPermutation

MASK = [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
DTYPES = [torch.float32, torch.bfloat16]
quick = settings(max_examples=60, deadline=None, derandomize=True)


def make(mask: list[list[int]]) -> RowPermutation:
    mask_RZ = torch.tensor(mask, dtype=torch.bool).view(len(mask), len(mask[0]))
    most = int(mask_RZ.sum(dim=1).max())
    return RowPermutation.from_mask(mask_RZ, int(mask_RZ.sum()), most)


@st.composite
def masks(draw: st.DrawFn) -> list[list[int]]:
    """Up to 7 rows and 5 destinations, any pattern."""
    width = draw(st.integers(1, 5))
    row = st.lists(st.integers(0, 1), min_size=width, max_size=width)
    return draw(st.lists(row, min_size=1, max_size=7))


def whole_numbers(rows: int, width: int, seed: int) -> Tensor:
    """Small integers, whose sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, width), generator=generator).float()


def test_indices_by_hand() -> None:
    permutation = make(MASK)
    assert permutation.row_X.tolist() == [0, 2, 2, 0]
    assert permutation.place_X.tolist() == [0, 2, 5, 6]
    assert permutation.copies_by_row_X.tolist() == [0, 3, 1, 2]
    assert permutation.start_R.tolist() == [0, 2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_by_hand(dtype: torch.dtype) -> None:
    """a, c, c, a; the gradient of a row is the sum over its copies."""
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=dtype, requires_grad=True)
    copies = make(MASK).permute(rows)
    assert copies.tolist() == [[1, 2], [5, 6], [5, 6], [1, 2]]
    copies.backward(torch.tensor([[1.0, 1], [10, 10], [20, 20], [2, 2]], dtype=dtype))
    assert rows.grad is not None and rows.grad.tolist() == [[3, 3], [0, 0], [30, 30]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpermute_by_hand(dtype: torch.dtype) -> None:
    """a = copy 0 + copy 3, b = 0, c = copy 1 + copy 2; each copy gets its row's gradient."""
    copies = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=dtype, requires_grad=True)
    rows = make(MASK).unpermute(copies)
    assert rows.tolist() == [[5], [0], [5]]
    rows.backward(torch.tensor([[7.0], [8.0], [9.0]], dtype=dtype))
    assert copies.grad is not None and copies.grad.tolist() == [[7], [9], [9], [7]]


def test_pairs_are_added_and_rounded_once() -> None:
    """Every row has two copies: in bf16 their sum is that of one addition."""
    permutation = make([[1, 1, 0], [0, 1, 1]])
    assert permutation.in_pairs
    copies = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = permutation.unpermute(copies)
    assert torch.equal(rows, torch.stack([copies[0] + copies[1], copies[2] + copies[3]]))


def test_no_rows_and_no_copies() -> None:
    nothing = RowPermutation.from_mask(torch.zeros(0, 3, dtype=torch.bool), 0, 2)
    assert nothing.permute(torch.zeros(0, 4)).shape == (0, 4)
    assert nothing.unpermute(torch.zeros(0, 4)).shape == (0, 4)
    unused = make([[0, 0], [0, 0]])
    rows = torch.ones(2, 4, requires_grad=True)
    unused.unpermute(unused.permute(rows)).sum().backward()
    assert rows.grad is not None and not rows.grad.any()


@quick
@given(masks(), st.integers(0, 10))
def test_unpermute_undoes_permute_up_to_the_number_of_copies(
    mask: list[list[int]], seed: int
) -> None:
    permutation = make(mask)
    for dtype in DTYPES:
        rows = whole_numbers(len(mask), 3, seed).to(dtype)
        copies = torch.tensor([[sum(row)] for row in mask], dtype=dtype)
        assert torch.equal(permutation.unpermute(permutation.permute(rows)), rows * copies)


@quick
@given(masks(), st.integers(0, 10))
def test_each_is_the_gradient_of_the_other(mask: list[list[int]], seed: int) -> None:
    """<permute(x), y> = <x, unpermute(y)>, and autograd agrees."""
    permutation = make(mask)
    rows = whole_numbers(len(mask), 3, seed).requires_grad_()
    copies = whole_numbers(sum(map(sum, mask)), 3, seed + 1).requires_grad_()
    left = (permutation.permute(rows) * copies.detach()).sum()
    right = (rows.detach() * permutation.unpermute(copies)).sum()
    assert left == right
    left.backward()
    right.backward()
    assert torch.equal(rows.grad, permutation.unpermute(copies.detach()))
    assert torch.equal(copies.grad, permutation.permute(rows.detach()))


@quick
@given(masks())
def test_copies_are_in_the_order_of_destinations_and_rows(mask: list[list[int]]) -> None:
    permutation = make(mask)
    pairs = [divmod(place, len(mask)) for place in permutation.place_X.tolist()]
    assert [row for _, row in pairs] == permutation.row_X.tolist()
    wanted = [(z, r) for z in range(len(mask[0])) for r in range(len(mask)) if mask[r][z]]
    assert pairs == wanted
    by_row = permutation.copies_by_row_X.tolist()
    assert [pairs[x] for x in by_row] == sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    before = [sum(map(sum, mask[:row])) for row in range(len(mask))]
    assert permutation.start_R.tolist() == before
