"""Collating: padding by hand, and the number of image positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.example import SkippedSample
from tests.unit.data.stream.streams import example


def two(**options: int) -> Batch:
    first = example([1, 99, 99, 5], [0, 1, 1, 0], 1, "a")
    second = example([1, 99, 99, 99, 99, 7, 8], [0, 1, 1, 1, 1, 0, 0], 2, "b")
    return collate([first, second], pad_id=3, num_image_tokens=2, **options)


def test_padding_by_hand() -> None:
    batch = two(multiple_of=4)
    assert batch.tokens.tolist() == [[1, 99, 99, 5, 3, 3, 3, 3], [1, 99, 99, 99, 99, 7, 8, 3]]
    assert batch.labels.tolist() == [
        [-100, 99, 5, -100, -100, -100, -100, -100],
        [-100, 99, 99, 99, 7, 8, -100, -100],
    ]
    assert batch.token_types.tolist() == [[0, 1, 1, 0, 2, 2, 2, 2], [0, 1, 1, 1, 1, 0, 0, 2]]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert [t.dtype for t in (batch.tokens, batch.labels, batch.position_ids)] == [torch.int64] * 3
    assert batch.token_types.dtype == torch.int8 and batch.images.dtype == torch.uint8
    assert batch.images[:, 0, 0, 0].tolist() == [4, 7, 7]
    assert batch.record_ids == ("a", "b")
    assert batch.skipped_samples == (SkippedSample("f", 4, "why"), SkippedSample("f", 7, "why"))


def test_labels_by_hand() -> None:
    batch = two(multiple_of=4)
    assert batch.num_label_tokens == 7
    # Position p of row r is index 2 * p + r of the transposed batch.
    assert batch.label_positions.tolist() == [2, 3, 4, 5, 7, 9, 11]


def test_lengths() -> None:
    assert two().tokens.shape == (2, 7)
    assert two(pad_to=12, multiple_of=4).tokens.shape == (2, 12)
    with pytest.raises(AssertionError):
        two(pad_to=10, multiple_of=4)
    with pytest.raises(AssertionError):
        two(pad_to=6)


def test_without_images_or_labels() -> None:
    batch = collate([example([1], [0], 0)], pad_id=0, num_image_tokens=2)
    assert batch.images.shape == (0, 3, 4, 4)
    assert batch.num_label_tokens == 0 and batch.label_positions.shape == (0,)


def test_image_positions_must_match_the_images() -> None:
    with pytest.raises(AssertionError, match="1 image positions for 1 images of 2 tokens = 2"):
        collate([example([1, 99, 5], [0, 1, 0], 1)], pad_id=0, num_image_tokens=2)
    batch = two()
    with pytest.raises(AssertionError, match="6 image positions for 2 images"):
        dataclasses.replace(batch, images=batch.images[:2])
