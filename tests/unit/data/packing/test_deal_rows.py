"""Rows for all ranks: by hand, by properties, and against packing every rank alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_megatron.data.packing.best_fit import best_fit_decreasing
from moiie_megatron.data.packing.deal_rows import deal_rows
from moiie_megatron.data.packing.even_rows import EvenRows

CHECKS = settings(max_examples=80, deadline=None, derandomize=True)
IMAGE_TOKENS = 10
Plan = list[list[list[int]]]


def deal(lengths: list[int], images: list[int], ranks: int, multiple_of: int = 1) -> Plan:
    return deal_rows(
        lengths,
        images,
        num_ranks=ranks,
        capacity=100,
        num_image_tokens=IMAGE_TOKENS,
        rows_multiple_of=multiple_of,
    )


def sums(plan: Plan, values: list[int]) -> np.ndarray:
    """(ranks, rows)"""
    return np.array([[sum(values[i] for i in row) for row in rows] for rows in plan])


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """Lengths, images, ranks, and what the rows of a rank are a multiple of."""
    ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    sample = st.tuples(st.integers(0, 3), st.integers(1, 60))
    samples = draw(st.lists(sample, min_size=ranks * per_rank, max_size=ranks * per_rank))
    images = [count for count, _ in samples]
    lengths = [IMAGE_TOKENS * count + text for count, text in samples]
    return lengths, images, ranks, draw(st.sampled_from([1, 1, 2, 3]))


@CHECKS
@given(batches())
def test_every_sample_once_and_equally_many_rows(
    batch: tuple[list[int], list[int], int, int],
) -> None:
    lengths, images, ranks, multiple_of = batch
    plan = deal(lengths, images, ranks, multiple_of)
    assert plan == deal(lengths, images, ranks, multiple_of)
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(len(lengths)))
    (number,) = {len(rows) for rows in plan}
    per_rank = len(lengths) // ranks
    assert number % multiple_of == 0 or number == per_rank
    assert all(row == sorted(row) and row for rows in plan for row in rows)
    tokens = sums(plan, lengths)
    assert tokens.max() <= 100
    # Neither more rows than best fit decreasing over all samples, nor than were possible.
    packed = math.ceil(len(best_fit_decreasing(lengths, 100)) / ranks)
    assert number <= min(math.ceil(packed / multiple_of) * multiple_of, per_rank)
    assert number * ranks * 100 >= sum(lengths)


def test_by_hand() -> None:
    # A rank alone would need two rows for 60 + 50, the other one row.
    assert deal([60, 50, 20, 10], [1, 1, 0, 0], 2) == [[[0, 3]], [[1, 2]]]
    # Best fit decreasing would take three rows: 40 + 40, 30 + 30 + 30, 30.
    assert deal([40, 40, 30, 30, 30, 30], [0] * 6, 1) == [[[0, 2, 4], [1, 3, 5]]]
    # Rows are in pairs; there are enough samples for them.
    assert [len(rows) for rows in deal([10] * 8, [0] * 8, 2, multiple_of=2)] == [2, 2]
    # One sample per row is as far as rows can be split.
    assert deal([10, 20, 30, 40, 50, 60], [0] * 6, 2, multiple_of=4) == [
        [[5], [2], [1]],
        [[4], [3], [0]],
    ]
    with pytest.raises(AssertionError, match="3, 2"):
        deal([10, 20, 30], [0] * 3, 2)


def test_images_are_even_where_tokens_are() -> None:
    """Samples of one length, every second one an image: as many images in every row."""
    plan = deal([25] * 32, [2, 0] * 16, 4)
    assert sums(plan, [2, 0] * 16).tolist() == [[4, 4]] * 4


def drawn(seed: int, count: int) -> tuple[list[int], list[int]]:
    """Most samples have an image of ten tokens; capacity 100 holds some four of them."""
    rng = np.random.default_rng(seed)
    images = (rng.random(count) < 0.9).astype(int)
    text = np.clip(np.exp(rng.normal(2.0, 0.7, count)), 2, 80).astype(int)
    return (text + IMAGE_TOKENS * images + 3).tolist(), images.tolist()


@pytest.mark.parametrize(
    ("ranks", "per_rank", "fraction"), [(4, 16, 1.0), (16, 4, 0.6), (32, 4, 0.6)]
)
def test_more_even_and_fewer_rows_than_every_rank_alone(
    ranks: int, per_rank: int, fraction: float
) -> None:
    rows, rows_alone = 0, 0
    uneven: list[tuple[float, float]] = []  # maximum over mean, now and alone
    for seed in range(10):
        lengths, images = drawn(seed, ranks * per_rank)
        plan = deal(lengths, images, ranks)
        alone = [lengths[i : i + per_rank] for i in range(0, len(lengths), per_rank)]
        rows += len(plan[0])
        rows_alone += max(len(best_fit_decreasing(part, 100)) for part in alone)
        for values in (lengths, images):
            per_row, per_rank_sum = sums(plan, values), sums(plan, values).sum(1)
            before = np.array(values).reshape(ranks, per_rank).sum(1)
            assert per_rank_sum.max() <= before.max()
            uneven.append((per_rank_sum.max() / per_rank_sum.mean(), before.max() / before.mean()))
            # The rows of a micro-batch are even too, not only the ranks.
            assert (per_row.max(0) <= 1.35 * per_row.mean(0)).all()
    assert rows <= fraction * rows_alone
    now, earlier = np.array(uneven).mean(0) - 1
    assert now < 0.4 * earlier and earlier > 0.05


def test_rows_are_exchanged_until_they_fit() -> None:
    """The longest-first rule leaves 52 and 48; two samples for two even them."""
    rows = EvenRows([[0, 1, 2], [3, 4, 5]], [20, 20, 12, 18, 18, 12], [0] * 6, 50, IMAGE_TOKENS)
    assert not rows.fits
    rows.shorten(10)
    assert rows.fits and rows.tokens.tolist() == [50, 50]


def test_rows_that_cannot_fit_are_left() -> None:
    rows = EvenRows([[0, 1], [2]], [30, 30, 30], [0] * 3, 50, IMAGE_TOKENS)
    rows.shorten(10)
    assert not rows.fits and sorted(map(len, rows.rows)) == [1, 2]


@CHECKS
@given(batches(), st.data())
def test_exchanges_keep_samples_and_what_fits(
    batch: tuple[list[int], list[int], int, int], data: st.DataObject
) -> None:
    lengths, images, _, _ = batch
    start = best_fit_decreasing(lengths, 100)
    rows = EvenRows(start, lengths, images, 100, IMAGE_TOKENS)
    before = int((rows.tokens**2 + (IMAGE_TOKENS * rows.images) ** 2).sum())
    rows.even_out(data.draw(st.integers(0, 20)))
    assert rows.fits and all(rows.rows)
    assert sorted(i for row in rows.rows for i in row) == list(range(len(lengths)))
    assert rows.tokens.tolist() == [sum(lengths[i] for i in row) for row in rows.rows]
    assert rows.images.tolist() == [sum(images[i] for i in row) for row in rows.rows]
    assert int((rows.tokens**2 + (IMAGE_TOKENS * rows.images) ** 2).sum()) <= before
