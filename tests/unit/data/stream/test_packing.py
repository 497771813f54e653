"""Packing: which samples share a row, and what a row is, by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.packing import (
    PackingSpec,
    best_fit_decreasing,
    pack,
    split_rows_to_count,
)
from tests.unit.data.stream.test_batch import example

SHAPE = PackingSpec(capacity=12, sequence_length=8, num_image_tokens=2, pad_id=3)
FIELDS = ("tokens", "labels", "position_ids", "token_types", "images", "cu_seqlens")


def text(n: int, name: str) -> Example:
    return example(list(range(n)), [0] * n, 0, name)


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
def test_rows_by_hand(lengths: list[int], rows: list[list[int]]) -> None:
    assert best_fit_decreasing(lengths, 10) == rows


def test_rows_hold_everything_once_and_are_few() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        lengths = torch.randint(1, 101, (40,), generator=generator).tolist()
        rows = best_fit_decreasing(lengths, 100)
        assert sorted(i for row in rows for i in row) == list(range(40))
        sums = [sum(lengths[i] for i in row) for row in rows]
        assert max(sums) <= 100
        # Best fit decreasing needs at most 11/9 of the fewest rows possible, and 4 more.
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // 100) + 4


def test_a_sample_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="13 tokens, more than the 12 of a row"):
        pack([text(13, "a")], SHAPE)


def three() -> list[Example]:
    return [
        example([1, 99, 99, 5], [0, 1, 1, 0], 1, "a"),
        text(10, "b"),
        example([1, 99, 99, 99, 99, 7, 8], [0, 1, 1, 1, 1, 0, 0], 2, "c"),
    ]


def test_a_packed_row_by_hand() -> None:
    first, second = pack(three(), dataclasses.replace(SHAPE, multiple_of=4))
    assert first.tokens.tolist() == [[1, 99, 99, 5, 1, 99, 99, 99, 99, 7, 8, 3]]
    assert first.labels.tolist() == [[-100, 99, 5, -100, -100, 99, 99, 99, 7, 8, -100, -100]]
    assert first.token_types.tolist() == [[0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 2]]
    assert first.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0]]
    assert first.images[:, 0, 0, 0].tolist() == [4, 7, 7]
    assert first.record_ids == ("a", "c")
    assert [fault.index for fault in first.skipped_samples] == [4, 7]
    assert first.cu_seqlens is not None and first.cu_seqlens.tolist() == [0, 4, 11, 12]
    assert second.record_ids == ("b",) and second.images.shape == (0, 3, 4, 4)
    assert second.cu_seqlens is not None and second.cu_seqlens.tolist() == [0, 10, 12]
    kinds = [t.dtype for t in (first.tokens, first.token_types, first.cu_seqlens, first.images)]
    assert kinds == [torch.int64, torch.int8, torch.int32, torch.uint8]


def test_lengths_of_rows() -> None:
    exact = pack(three(), SHAPE)
    assert [row.tokens.shape for row in exact] == [(1, 11), (1, 10)]
    assert exact[0].cu_seqlens is not None and exact[0].cu_seqlens.tolist() == [0, 4, 11]
    full = PackingSpec(24, 8, num_image_tokens=2, pad_id=3, full=True)
    (row,) = pack([text(5, "a")], full)
    # No segment, and so no position, is longer than a sample may be.
    assert row.cu_seqlens is not None and row.cu_seqlens.tolist() == [0, 5, 13, 21, 24]
    assert row.position_ids.tolist() == [[*range(5), *range(8), *range(8), *range(3)]]
    assert row.tokens.shape == (1, 24) and row.token_types.sum() == 2 * 19
    with pytest.raises(ValueError, match="12 tokens is not a multiple of 8"):
        dataclasses.replace(SHAPE, multiple_of=8)


def assert_same(got: Batch, expected: Batch) -> None:
    assert got.record_ids == expected.record_ids
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_rows_are_spread_between_samples() -> None:
    shape = PackingSpec(40, 20, num_image_tokens=2, pad_id=3, multiple_of=4)
    a, b, c = three()
    rows = pack([a, b, c], shape)
    assert [row.record_ids for row in rows] == [("a", "b", "c")]
    assert split_rows_to_count(rows, 1, shape) == rows
    # 4 + 10 + 7: 14 and 7 are nearer to each other than 4 and 17.
    first, second = split_rows_to_count(rows, 2, shape)
    assert_same(first, pack([a, b], shape)[0])
    assert_same(second, pack([c], shape)[0])
    assert [fault.index for fault in (*first.skipped_samples, *second.skipped_samples)] == [
        4,
        10,
        7,
    ]
    for row, alone in zip(split_rows_to_count(rows, 3, shape), (a, b, c), strict=True):
        assert_same(row, pack([alone], shape)[0])
    with pytest.raises(ValueError, match="3 samples in 1 rows cannot be spread over 4"):
        split_rows_to_count(rows, 4, shape)


def test_the_boundaries_stay_on_the_host() -> None:
    row = pack(three(), SHAPE)[0].to("meta")
    assert row.tokens.is_meta
    assert row.cu_seqlens is not None and row.cu_seqlens.device.type == "cpu"
