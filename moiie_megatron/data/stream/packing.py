"""Sequence packing: several samples behind each other in one row, and everything about them once.

A step's share of a data-parallel rank is put into as few rows as possible; every row is a
micro-batch of its own.  Attention and positions begin anew in every sample (``cu_seqlens``), so a
sample's loss is that of the sample alone.

Shapes: s tokens of a row, k segments of it (its samples, then its padding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Example, SkippedSample
from moiie_megatron.layout.token_types import IMAGE, PADDING
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class PackingSpec:
    """What all rows of a run have in common.

    Attributes:
        capacity: Most tokens of a row.
        sequence_length: Most tokens of a segment; longer padding is several segments, so that
            no position is beyond those of a sample.
        num_image_tokens: Positions per image.
        pad_id: Token at padded positions.
        multiple_of: The length is a multiple of this (sequence parallelism cuts evenly).
        full: Every row is padded to the capacity.
    """

    capacity: int
    sequence_length: int
    num_image_tokens: int
    pad_id: int
    multiple_of: int = 1
    full: bool = False

    def __post_init__(self) -> None:
        if self.capacity % self.multiple_of:
            raise UserError(
                f"A row of {self.capacity} tokens is not a multiple of {self.multiple_of}: choose "
                "a data.sequence_length that is."
            )


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things of given lengths into few rows: best fit decreasing, a pure function.

    The longest goes first, each into the fullest row that still has room.

    Returns:
        Numbers of the things by row, ascending; rows in the order of their first things.

    Raises:
        ValueError: One is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > capacity:
            raise ValueError(
                f"A sample has {lengths[i]} tokens, more than the {capacity} of a row."
            )
        fitting = [row for row, free in enumerate(room) if free >= lengths[i]]
        if fitting:
            row = min(fitting, key=lambda row: (room[row], row))
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return sorted(sorted(row) for row in rows)


def pack(examples: Sequence[Example], shape: PackingSpec) -> list[Batch]:
    """The rows of one rank's share of a step, each a micro-batch.

    Raises:
        ValueError: A sample is longer than a row, or its image positions do not fit its images.
    """
    lengths = [len(example.encoded.tokens) for example in examples]
    return [
        _row([examples[i] for i in numbers], shape)
        for numbers in best_fit_decreasing(lengths, shape.capacity)
    ]


def split_rows_to_count(rows: list[Batch], count: int, shape: PackingSpec) -> list[Batch]:
    """As many rows as the rank with the most has: long rows are cut between two samples.

    Expert parallelism needs equally many micro-batches on all ranks, and the balance losses are
    means over micro-batches: rows without any sample would dilute them.

    Args:
        count: At least the rows that there are, at most the samples in them.

    Raises:
        ValueError: There are fewer samples than ``count``, or more rows.
    """
    samples = sum(len(row.record_ids) for row in rows)
    if not len(rows) <= count <= samples:
        raise ValueError(f"{samples} samples in {len(rows)} rows cannot be spread over {count}.")
    rows = list(rows)
    while len(rows) < count:
        several = [i for i, row in enumerate(rows) if len(row.record_ids) > 1]
        longest = max(several, key=lambda i: (_ends(rows[i])[-1], -i))
        rows[longest : longest + 1] = _halves(rows[longest], shape)
    return rows


def _row(examples: Sequence[Example], shape: PackingSpec) -> Batch:
    encoded = [example.encoded for example in examples]
    return _padded(
        tokens=torch.cat([one.tokens for one in encoded]),
        labels=torch.cat([one.labels for one in encoded]),
        token_types=torch.cat([one.token_types for one in encoded]),
        ends=list(accumulate(len(one.tokens) for one in encoded)),
        images=torch.cat([example.images for example in examples]),
        record_ids=tuple(example.record_id for example in examples),
        skipped_samples=tuple(fault for example in examples for fault in example.skipped_samples),
        shape=shape,
    )


def _halves(row: Batch, shape: PackingSpec) -> list[Batch]:
    """The row as two, cut where the longer one is shortest; faults stay with the first."""
    ends = _ends(row)
    cut = min(range(1, len(ends)), key=lambda n: max(ends[n - 1], ends[-1] - ends[n - 1]))
    middle = ends[cut - 1]
    images = int((row.token_types[0, :middle] == IMAGE).sum()) // shape.num_image_tokens
    parts = (
        (slice(0, middle), slice(0, images), slice(0, cut), row.skipped_samples),
        (slice(middle, ends[-1]), slice(images, None), slice(cut, None), ()),
    )
    return [
        _padded(
            tokens=row.tokens[0, positions],
            labels=row.labels[0, positions],
            token_types=row.token_types[0, positions],
            ends=[end - positions.start for end in ends[samples]],
            images=row.images[pictures],
            record_ids=row.record_ids[samples],
            skipped_samples=skipped_samples,
            shape=shape,
        )
        for positions, pictures, samples, skipped_samples in parts
    ]


def _ends(row: Batch) -> list[int]:
    """Where the samples of a row end, without its padding."""
    assert row.cu_seqlens is not None
    return list(row.cu_seqlens[1 : len(row.record_ids) + 1].tolist())


def _padded(
    tokens: Tensor,
    labels: Tensor,
    token_types: Tensor,
    ends: list[int],
    images: Tensor,
    record_ids: tuple[str, ...],
    skipped_samples: tuple[SkippedSample, ...],
    shape: PackingSpec,
) -> Batch:
    used = len(tokens)
    length = math.ceil(used / shape.multiple_of) * shape.multiple_of
    length = shape.capacity if shape.full else length
    padding_ends = [*range(used + shape.sequence_length, length, shape.sequence_length), length]
    cu_seqlens = [0, *ends, *(padding_ends if length > used else [])]
    positions = [
        torch.arange(end - start) for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)
    ]

    def padded(values: Tensor, value: int) -> Tensor:
        return F.pad(values, (0, length - used), value=value).unsqueeze(0)

    return Batch(
        tokens=padded(tokens, shape.pad_id),
        labels=padded(labels, IGNORE),
        position_ids=torch.cat(positions).unsqueeze(0),
        token_types=padded(token_types, PADDING),
        images=images,
        num_image_tokens=shape.num_image_tokens,
        record_ids=record_ids,
        skipped_samples=skipped_samples,
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
    )
