"""What the model is fed: one padded micro-batch.

Shapes: b rows, s tokens, n images in the whole micro-batch, S pixels per image side, k segments
of a packed row, l tokens with a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.example import Example, SkippedSample
from moiie_megatron.layout.token_types import IMAGE, PADDING


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded at the right.

    Attributes:
        tokens: int64 [b, s]; ``image_id`` at image positions.
        labels: int64 [b, s], already shifted; -100 where there is nothing to learn.
        position_ids: int64 [b, s], 0..s-1 in every row; from 0 again in every segment.
        token_types: int8 [b, s] of ``layout/token_types.py``.
        images: uint8 [n, 3, S, S] in the order of their runs, row by row.
        num_image_tokens: Positions per image.
        record_ids: One per sample.
        skipped_samples: Samples skipped while making the batch.
        cu_seqlens: int32 [k + 1] on the CPU, where the segments of a packed row (b = 1) begin
            and end: its samples, then its padding (``data/stream/packing.py``).  None: every row
            is one sample.

    Raises:
        ValueError: The number of image positions is not n * ``num_image_tokens``.
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

    def __post_init__(self) -> None:
        if self.tokens.device.type != "cpu":
            return  # checked where it was made; counting here would wait for the device
        found = int((self.token_types == IMAGE).sum())
        wanted = len(self.images) * self.num_image_tokens
        if found != wanted:
            raise ValueError(
                f"The batch has {found} image positions but {len(self.images)} images of "
                f"{self.num_image_tokens} tokens = {wanted}: every image needs its full run."
            )

    @property
    def loss_mask(self) -> Tensor:
        """float32 [b, s]: 1 where there is a target."""
        return (self.labels != IGNORE).float()

    @property
    def label_positions(self) -> Tensor:
        """int64 [l]: where the targets are in the transposed batch [s, b]."""
        return (self.labels.t().reshape(-1) != IGNORE).nonzero().squeeze(1)

    @property
    def num_label_tokens(self) -> int:
        """Positions with a target (waits for the device if the batch is on one)."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; torch's DataLoader calls this by its name."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        # cu_seqlens stays: lengths are read on the host.
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            position_ids=change(self.position_ids),
            token_types=change(self.token_types),
            images=change(self.images),
        )


def collate(
    examples: Sequence[Example],
    *,
    pad_id: int,
    num_image_tokens: int,
    pad_to: int | None = None,
    multiple_of: int = 1,
) -> Batch:
    """Pad examples to one length.

    Args:
        examples: At least one.
        pad_id: Token at padded positions.
        num_image_tokens: Positions per image.
        pad_to: The length; None takes the longest example, rounded up.
        multiple_of: The length is a multiple of this (sequence parallelism cuts evenly).

    Raises:
        ValueError: An example longer than ``pad_to``, a ``pad_to`` that is not a multiple, or a
            wrong number of image positions.
    """
    longest = max(len(example.encoded.tokens) for example in examples)
    length = pad_to or math.ceil(longest / multiple_of) * multiple_of
    if length % multiple_of:
        raise ValueError(
            f"The padded length {length} is not a multiple of {multiple_of}: choose a "
            "data.sequence_length that is."
        )
    if longest > length:
        raise ValueError(f"A sample has {longest} tokens, more than the padded length {length}.")

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
        skipped_samples=tuple(fault for example in examples for fault in example.skipped_samples),
    )
