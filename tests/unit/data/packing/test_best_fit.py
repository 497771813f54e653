"""Rules of bin packing: by hand and by properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_megatron.data.packing.best_fit import (
    best_fit_decreasing,
    split_to_count,
    spread_evenly,
)

CHECKS = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([], []),
        ([10], [[0]]),
        # 6 and 5 open rows; 4 fits best into the row of 6, 3 into that of 5, 2 as well.
        ([4, 3, 6, 2, 5], [[0, 2], [1, 3, 4]]),
        # Best fit, not first fit: 3 leaves nothing in the second row, 4 goes to the first.
        ([6, 7, 3, 4], [[0, 3], [1, 2]]),
        # Equal lengths keep their order.
        ([5, 5, 5, 5], [[0, 1], [2, 3]]),
        ([10, 1, 10], [[0], [1], [2]]),
    ],
)
def test_few_rows_by_hand(lengths: list[int], rows: list[list[int]]) -> None:
    assert best_fit_decreasing(lengths, 10) == rows


@CHECKS
@given(st.lists(st.integers(1, 100), max_size=60))
def test_rows_hold_every_item_once_and_are_few(lengths: list[int]) -> None:
    rows = best_fit_decreasing(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert rows == sorted(sorted(row) for row in rows)
    # Best fit decreasing needs at most 11/9 of the fewest rows possible, and 4 more.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 100) + 4
    # Two rows that would fit into one are never left.
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 100


def test_an_item_longer_than_a_row() -> None:
    with pytest.raises(AssertionError, match="13, 12"):
        best_fit_decreasing([13], 12)


@CHECKS
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.data())
def test_even_rows_differ_by_one_item(lengths: list[int], data: st.DataObject) -> None:
    rows = spread_evenly(lengths, data.draw(st.integers(1, len(lengths))))
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    for row, total in zip(rows, sums, strict=True):
        # Without its shortest item, the row was the shortest one.
        assert row and total - min(lengths[i] for i in row) <= min(sums)


def test_even_rows_by_hand() -> None:
    assert spread_evenly([4, 3, 6, 2, 5], 2) == [[2, 1, 3], [4, 0]]
    with pytest.raises(AssertionError, match="3, 2"):
        spread_evenly([1, 1], 3)


def test_rows_are_split_by_hand() -> None:
    lengths = [4, 10, 7, 20, 1]
    rows = [[0, 1, 2], [3], [4]]
    assert sorted(split_to_count(rows, lengths, 3)) == rows
    # The longest row that can be split: 10 and 7 + 4.
    assert sorted(map(sorted, split_to_count(rows, lengths, 4))) == [[0, 2], [1], [3], [4]]
    assert sorted(split_to_count(rows, lengths, 5)) == [[0], [1], [2], [3], [4]]
    for count in (2, 6):
        with pytest.raises(AssertionError):
            split_to_count(rows, lengths, count)


@CHECKS
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.data())
def test_split_rows_are_parts_of_rows(lengths: list[int], data: st.DataObject) -> None:
    rows = best_fit_decreasing(lengths, 100)
    split = split_to_count(rows, lengths, data.draw(st.integers(len(rows), len(lengths))))
    assert sorted(i for row in split for i in row) == list(range(len(lengths)))
    assert all(row and any(set(row) <= set(whole) for whole in rows) for row in split)
