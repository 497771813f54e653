"""What the model is fed: one padded micro-batch (shapes: ``moiie_megatron/data/__init__.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.example import Example, Notice, SkippedSample
from moiie_megatron.layout.token_types import IMAGE, PADDING


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right.

    Attributes:
        tokens: int64 (b, s); ``image_id`` at image positions.
        labels: int64 (b, s), already shifted; -100 where there is no target.
        position_ids: int64 (b, s); 0, 1, ... in every row, starting anew at every segment.
        token_types: int8 (b, s), see ``layout/token_types.py``.
        images: uint8 (i, 3, S, S), row by row in the order of their positions.
        num_image_tokens: Positions per image.
        record_ids: One per sample.
        skipped_samples: Samples that were skipped while the batch was read.
        cu_seqlens: int32 (c + 1,) on the CPU: the boundaries of the segments of a packed row, its
            samples and then its padding (``data/packing/rows.py``; b is 1).  None: every row is
            one sample.
        notices: What was noticed about its samples.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    token_types: Tensor
    images: Tensor
    num_image_tokens: int
    record_ids: tuple[str, ...]
    skipped_samples: tuple[SkippedSample, ...] = ()
    cu_seqlens: Tensor | None = None
    notices: tuple[Notice, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.device.type != "cpu":
            return  # checked on the CPU; counting on a GPU would synchronize with it
        found = int((self.token_types == IMAGE).sum())
        expected = len(self.images) * self.num_image_tokens
        assert found == expected, (
            f"{found} image positions for {len(self.images)} images of {self.num_image_tokens} "
            f"tokens = {expected}"
        )

    @property
    def label_positions(self) -> Tensor:
        """int64 (y,): indices of the labels in the flattened transposed batch (s, b)."""
        return (self.labels.t().reshape(-1) != IGNORE).nonzero().squeeze(1)

    @property
    def image_positions(self) -> Tensor:
        """int64 (i * num_image_tokens,): see ``image_positions``."""
        return image_positions(self.token_types)

    @property
    def num_label_tokens(self) -> int:
        """Number of positions with a label; synchronizes if the batch is on a GPU."""
        return int((self.labels != IGNORE).sum())

    @property
    def sample_lengths(self) -> Tensor:
        """int64 (c,) or (b,): tokens of every segment or row, without padding."""
        is_token = self.token_types != PADDING
        if self.cu_seqlens is None:
            return is_token.sum(dim=1)
        before = torch.nn.functional.pad(is_token.flatten().cumsum(0), (1, 0))
        return before.index_select(0, self.cu_seqlens).diff()

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; torch's DataLoader calls this method by its name."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            token_types=self.token_types.pin_memory(),
            images=self.images.pin_memory(),
        )


def image_positions(token_types: Tensor) -> Tensor:
    """Where the features of the images go, in the order of the images.

    On a GPU the host waits for the result's size.

    Args:
        token_types: int8 (b, s).

    Returns:
        int64 (image positions,): indices in the flattened transposed batch (s, b).
    """
    rows, columns = (token_types == IMAGE).nonzero(as_tuple=True)
    return columns * len(token_types) + rows


def collate(
    examples: Sequence[Example],
    *,
    pad_id: int,
    num_image_tokens: int,
    pad_to: int | None = None,
    multiple_of: int = 1,
) -> Batch:
    """Pad samples to the same length.

    Args:
        examples: At least one, none longer than ``pad_to``.
        pad_id: Token at padded positions.
        num_image_tokens: Positions per image.
        pad_to: The length; None takes the longest sample, rounded up to ``multiple_of``.
        multiple_of: The length is a multiple of this (sequence parallelism splits it evenly).
    """
    longest = max(len(example.encoded.tokens) for example in examples)
    length = pad_to or math.ceil(longest / multiple_of) * multiple_of
    assert length % multiple_of == 0 and longest <= length, (longest, length, multiple_of)

    def padded(name: str, value: int) -> Tensor:
        rows = [getattr(example.encoded, name) for example in examples]
        stacked = pad_sequence(rows, batch_first=True, padding_value=value)
        return torch.nn.functional.pad(stacked, (0, length - stacked.shape[1]), value=value)

    return Batch(
        tokens=padded("tokens", pad_id),
        labels=padded("labels", IGNORE),
        position_ids=torch.arange(length).repeat(len(examples), 1),
        token_types=padded("token_types", PADDING),
        images=torch.cat([example.images for example in examples]),
        num_image_tokens=num_image_tokens,
        record_ids=tuple(example.record_id for example in examples),
        skipped_samples=tuple(
            skipped for example in examples for skipped in example.skipped_samples
        ),
        notices=tuple(notice for example in examples for notice in example.notices),
    )
