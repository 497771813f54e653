"""Sequence packing: several samples one after the other in a row.

The samples of a data-parallel rank in a step are packed into as few rows as possible; every row is
a micro-batch of its own.  Attention and positions start anew at every sample (``cu_seqlens``), so
the loss of a sample is that of the sample alone.

Shapes: ``moiie_megatron/data/__init__.py``.  A packed batch has b = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Example, SkippedSample
from moiie_megatron.layout.token_types import IMAGE, PADDING


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


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into few rows: the longest first, each into the fullest row with enough room.

    A pure function, so all ranks of a model-parallel group pack the same rows.

    Args:
        lengths: Length of every item, at most ``capacity``.
        capacity: Maximum total length of a row.

    Returns:
        The indices of the items of every row, ascending; rows ordered by their first items.
    """
    assert max(lengths, default=0) <= capacity, (max(lengths, default=0), capacity)
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
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


def pack(examples: Sequence[Example], spec: PackingSpec) -> list[Batch]:
    """The packed rows of the samples of one rank in a step, each a micro-batch.

    Args:
        examples: None longer than ``spec.capacity``.
        spec: What all rows have in common.
    """
    lengths = [len(example.encoded.tokens) for example in examples]
    return [
        _pack_row([examples[i] for i in row], spec)
        for row in best_fit_decreasing(lengths, spec.capacity)
    ]


def split_rows_to_count(rows: Sequence[Batch], count: int, spec: PackingSpec) -> list[Batch]:
    """Split the longest rows between two samples until there are ``count`` rows.

    Expert parallelism needs the same number of micro-batches on all ranks.  The balance losses are
    means over micro-batches, which rows without a sample would dilute.

    Args:
        rows: Packed rows.
        count: At least the number of rows, at most the number of samples in them.
        spec: The one that the rows were packed with.
    """
    rows = list(rows)
    assert len(rows) <= count <= sum(len(row.record_ids) for row in rows)
    while len(rows) < count:
        splittable = [i for i, row in enumerate(rows) if len(row.record_ids) > 1]
        longest = max(splittable, key=lambda i: (_sample_ends(rows[i])[-1], -i))
        rows[longest : longest + 1] = _split_row(rows[longest], spec)
    return rows


def equalize_row_counts(
    steps: Iterator[list[Batch]],
    spec: PackingSpec,
    max_over_dp: Callable[[int], int],
    rows_multiple_of: int = 1,
) -> Iterator[list[Batch]]:
    """The rows of every step, split so that all data-parallel ranks have the same number of rows.

    Args:
        steps: The packed rows of every step of this rank.
        spec: The one that the rows were packed with.
        max_over_dp: The maximum of a number over the data-parallel ranks; called once per step.
        rows_multiple_of: The number of rows is a multiple of this, and so must be the number of
            samples.
    """
    for rows in steps:
        count = math.ceil(max_over_dp(len(rows)) / rows_multiple_of) * rows_multiple_of
        yield split_rows_to_count(rows, count, spec)


def _pack_row(examples: Sequence[Example], spec: PackingSpec) -> Batch:
    encoded = [example.encoded for example in examples]
    row = _pad_row(
        tokens=torch.cat([sample.tokens for sample in encoded]),
        labels=torch.cat([sample.labels for sample in encoded]),
        token_types=torch.cat([sample.token_types for sample in encoded]),
        ends=list(accumulate(len(sample.tokens) for sample in encoded)),
        images=torch.cat([example.images for example in examples]),
        record_ids=tuple(example.record_id for example in examples),
        skipped_samples=tuple(
            skipped for example in examples for skipped in example.skipped_samples
        ),
        spec=spec,
    )
    return replace(row, notices=tuple(notice for example in examples for notice in example.notices))


def _split_row(row: Batch, spec: PackingSpec) -> list[Batch]:
    """Split a row in two so that the longer part is as short as possible.

    The first part keeps the skipped samples and what was noticed.
    """
    ends = _sample_ends(row)
    cut = min(range(1, len(ends)), key=lambda n: max(ends[n - 1], ends[-1] - ends[n - 1]))
    middle = ends[cut - 1]
    images = int((row.token_types[0, :middle] == IMAGE).sum()) // spec.num_image_tokens
    parts = (
        (slice(0, middle), slice(0, images), slice(0, cut), row.skipped_samples),
        (slice(middle, ends[-1]), slice(images, None), slice(cut, None), ()),
    )
    first, second = [
        _pad_row(
            tokens=row.tokens[0, positions],
            labels=row.labels[0, positions],
            token_types=row.token_types[0, positions],
            ends=[end - positions.start for end in ends[samples]],
            images=row.images[part_images],
            record_ids=row.record_ids[samples],
            skipped_samples=skipped_samples,
            spec=spec,
        )
        for positions, part_images, samples, skipped_samples in parts
    ]
    return [replace(first, notices=row.notices), second]


def _sample_ends(row: Batch) -> list[int]:
    """Where the samples of a row end, without its padding."""
    assert row.cu_seqlens is not None
    return list(row.cu_seqlens[1 : len(row.record_ids) + 1].tolist())


def _pad_row(
    *,
    tokens: Tensor,
    labels: Tensor,
    token_types: Tensor,
    ends: list[int],
    images: Tensor,
    record_ids: tuple[str, ...],
    skipped_samples: tuple[SkippedSample, ...],
    spec: PackingSpec,
) -> Batch:
    """The batch of one row, whose samples end at ``ends``."""
    used = len(tokens)
    length = math.ceil(used / spec.multiple_of) * spec.multiple_of
    length = spec.capacity if spec.pad_to_capacity else length
    padding_ends = [*range(used + spec.sequence_length, length, spec.sequence_length), length]
    cu_seqlens = [0, *ends, *(padding_ends if length > used else [])]
    positions = [torch.arange(end - start) for start, end in pairwise(cu_seqlens)]

    def padded(values: Tensor, value: int) -> Tensor:
        return F.pad(values, (0, length - used), value=value).unsqueeze(0)

    return Batch(
        tokens=padded(tokens, spec.pad_id),
        labels=padded(labels, IGNORE),
        position_ids=torch.cat(positions).unsqueeze(0),
        token_types=padded(token_types, PADDING),
        images=images,
        num_image_tokens=spec.num_image_tokens,
        record_ids=record_ids,
        skipped_samples=skipped_samples,
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
    )
