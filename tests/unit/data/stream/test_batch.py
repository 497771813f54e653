"""Collating: padding by hand, and the promise about image positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moiie_megatron.data.encode.encoder import Encoded
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.example import Example, SkippedSample


def example(tokens: list[int], types: list[int], images: int, name: str = "r") -> Example:
    labels = [-100, *tokens[2:], -100] if len(tokens) > 1 else [-100]
    encoded = Encoded(
        torch.tensor(tokens),
        torch.tensor(labels),
        torch.tensor(types, dtype=torch.int8),
        ("x",) * images,
    )
    pixels = torch.full((images, 3, 4, 4), len(tokens), dtype=torch.uint8)
    return Example(encoded, pixels, name, (SkippedSample("f", len(tokens), "why"),))


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
    assert batch.loss_mask.tolist()[0] == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert batch.num_label_tokens == int(batch.loss_mask.sum()) == 7
    assert batch.record_ids == ("a", "b")
    assert batch.skipped_samples == (SkippedSample("f", 4, "why"), SkippedSample("f", 7, "why"))


def test_lengths() -> None:
    assert two().tokens.shape == (2, 7)
    assert two(pad_to=12, multiple_of=4).tokens.shape == (2, 12)
    with pytest.raises(ValueError, match="10 is not a multiple of 4"):
        two(pad_to=10, multiple_of=4)
    with pytest.raises(ValueError, match="7 tokens, more than the padded length 6"):
        two(pad_to=6)


def test_without_images() -> None:
    batch = collate([example([1, 2], [0, 0], 0)], pad_id=0, num_image_tokens=2)
    assert batch.images.shape == (0, 3, 4, 4)
    assert batch.num_label_tokens == 0 or batch.loss_mask.sum() == batch.num_label_tokens


def test_image_positions_must_match_the_images() -> None:
    with pytest.raises(ValueError, match="1 image positions but 1 images of 2 tokens = 2"):
        collate([example([1, 99, 5], [0, 1, 0], 1)], pad_id=0, num_image_tokens=2)
    batch = two()
    with pytest.raises(ValueError, match="6 image positions but 2 images"):
        dataclasses.replace(batch, images=batch.images[:2])


def test_to_moves_every_tensor() -> None:
    batch = two().to("meta")
    tensors = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 5 and all(t.is_meta for t in tensors)
    assert batch.record_ids == ("a", "b") and len(batch.skipped_samples) == 2
