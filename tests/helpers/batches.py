"""Micro-batches made by hand, for the tiny models of ``tests/parity/tiny.py`` and demos."""

from __future__ import annotations

import torch

from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.layout.token_types import IMAGE, PADDING

LENGTH = 40


def text_batch(seed: int) -> Batch:
    """Two rows of random text without any image; the second is shorter."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 150, (2, LENGTH), generator=generator)
    types = torch.zeros(2, LENGTH, dtype=torch.int8)
    types[1, LENGTH - 7 :] = PADDING
    return _batch(tokens, types, torch.empty(0, 3, 28, 28, dtype=torch.uint8))


def image_batch(seed: int) -> Batch:
    """Two rows of two images each; hardly any text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 150, (2, LENGTH), generator=generator)
    types = torch.zeros(2, LENGTH, dtype=torch.int8)
    types[:, 1:33] = IMAGE
    images = torch.randint(0, 256, (4, 3, 28, 28), generator=generator, dtype=torch.uint8)
    return _batch(tokens, types, images)


def _batch(tokens: torch.Tensor, types: torch.Tensor, images: torch.Tensor) -> Batch:
    labels = torch.roll(tokens, -1, dims=1)
    labels[:, -1] = -100
    labels[types != 0] = -100
    positions = torch.arange(LENGTH).repeat(2, 1)
    return Batch(tokens, labels, positions, types, images, 16, ("a", "b"))
