"""Rows that packing fills: by hand, and against packing itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_megatron.data.audit.packed_rows import rows_needed
from moiie_megatron.data.packing.best_fit import best_fit_decreasing


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([5, 5], 10, 1),
        ([6, 6], 10, 2),
        ([6, 4, 3, 3, 4], 10, 2),
        ([3] * 7, 10, 3),
        ([20, 1], 10, 2),  # truncated to the capacity
        ([0, 4, 0], 10, 1),  # records that are skipped
        ([7, 7, 3, 2, 1], 10, 2),
        ([], 10, 0),
    ],
)
def test_rows_by_hand(lengths: list[int], capacity: int, rows: int) -> None:
    assert rows_needed(np.array(lengths, dtype=np.int32), capacity) == rows


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 50))
def test_as_many_rows_as_packing_all_samples_at_once(lengths: list[int], capacity: int) -> None:
    packed = best_fit_decreasing([min(n, capacity) for n in lengths if n], capacity)
    assert rows_needed(np.array(lengths, dtype=np.int32), capacity) == len(packed)


def test_rows_are_near_the_bound() -> None:
    lengths = np.random.default_rng(0).integers(20, 2000, 20_000).astype(np.int32)
    bound = -(-int(lengths.sum()) // 4096)
    assert bound <= rows_needed(lengths, 4096) <= 1.01 * bound
