"""A packed row: several samples one after the other, a micro-batch of its own.

Attention and positions start anew at every sample (``cu_seqlens``), so
the loss of a sample is that of the sample alone.

Shapes: ``moiie_megatron/data/__init__.py``.  A packed batch has b = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Example
from moiie_megatron.layout.token_types import PADDING


@dataclass(frozen=True)
class PackingSpec:
    """What all packed rows of a run have in common.

    Attributes:
        capacity: Maximum number of tokens of a row; a multiple of ``multiple_of``.
        sequence_length: Maximum number of tokens of a segment.  Longer padding is split into
            several segments, so that no position exceeds those of a sample.
        num_image_tokens: Positions per image.
        pad_id: Token at padded positions.
        multiple_of: The length of a row is a multiple of this (sequence parallelism splits rows
            evenly).
        pad_to_capacity: Pad every row to the capacity.
    """

    capacity: int
    sequence_length: int
    num_image_tokens: int
    pad_id: int
    multiple_of: int = 1
    pad_to_capacity: bool = False

    def __post_init__(self) -> None:
        assert self.capacity % self.multiple_of == 0, (self.capacity, self.multiple_of)


def pack_row(examples: Sequence[Example], spec: PackingSpec) -> Batch:
    """The micro-batch of one row.

    Args:
        examples: At least one, together not longer than ``spec.capacity``.
        spec: What all rows have in common.
    """
    encoded = [example.encoded for example in examples]
    tokens = torch.cat([sample.tokens for sample in encoded])
    used = len(tokens)
    assert used <= spec.capacity, (used, spec.capacity)
    length = math.ceil(used / spec.multiple_of) * spec.multiple_of
    length = spec.capacity if spec.pad_to_capacity else length
    ends = accumulate(len(sample.tokens) for sample in encoded)
    padding_ends = [*range(used + spec.sequence_length, length, spec.sequence_length), length]
    cu_seqlens = [0, *ends, *(padding_ends if length > used else [])]
    positions = [torch.arange(end - start) for start, end in pairwise(cu_seqlens)]

    def padded(values: Tensor, value: int) -> Tensor:
        return F.pad(values, (0, length - used), value=value).unsqueeze(0)

    return Batch(
        tokens=padded(tokens, spec.pad_id),
        labels=padded(torch.cat([sample.labels for sample in encoded]), IGNORE),
        position_ids=torch.cat(positions).unsqueeze(0),
        token_types=padded(torch.cat([sample.token_types for sample in encoded]), PADDING),
        images=torch.cat([example.images for example in examples]),
        num_image_tokens=spec.num_image_tokens,
        record_ids=tuple(example.record_id for example in examples),
        skipped_samples=tuple(
            skipped for example in examples for skipped in example.skipped_samples
        ),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        notices=tuple(notice for example in examples for notice in example.notices),
    )
