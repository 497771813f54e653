"""Which samples of a global batch share a row, and which data-parallel rank gets it.

A pure function of the samples' sizes, which all ranks compute alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from moiie_megatron.data.packing.best_fit import (
    best_fit_decreasing,
    split_to_count,
    spread_evenly,
)
from moiie_megatron.data.packing.even_rows import EvenRows

# Exchanges of samples between rows: to make them fit, and to even them.  Each takes some 0.1 ms.
_TO_FIT: Final = 256
_TO_EVEN: Final = 64


def deal_rows(
    lengths: Sequence[int],
    images: Sequence[int],
    *,
    num_ranks: int,
    capacity: int,
    num_image_tokens: int,
    rows_multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Pack the samples of a global batch into rows, equally many on every rank.

    Rows are as few as can be found, and the ranks even in tokens and images.  The rows of a
    micro-batch, one per rank, are of similar length: expert-parallel ranks wait for each other in
    every layer.

    Args:
        lengths: Tokens of every sample, 1 to ``capacity``; a multiple of ``num_ranks`` samples.
        images: Images of every sample.
        num_ranks: Number of data-parallel ranks.
        capacity: Maximum number of tokens of a row.
        num_image_tokens: Positions per image.
        rows_multiple_of: The rows of a rank are a multiple of this, unless they are one per
            sample.

    Returns:
        For every rank its rows, the longest first, each the ascending indices of its samples.
    """
    assert min(lengths) > 0 and max(lengths) <= capacity, (min(lengths), max(lengths), capacity)
    assert len(lengths) % num_ranks == 0, (len(lengths), num_ranks)
    samples = _Samples(lengths, images, capacity, num_image_tokens)
    rows = samples.few_rows(num_ranks * rows_multiple_of)
    number = len(rows.rows) // num_ranks
    dealt = samples.rows_by_rank(num_ranks, number) if min(num_ranks, number) > 1 else None
    if dealt is None:
        rows.even_out(_TO_EVEN)
        dealt = _deal(rows, num_ranks, num_image_tokens)
    return [[sorted(row) for row in own] for own in dealt]


@dataclass(frozen=True)
class _Samples:
    """The sizes of samples; arguments of ``deal_rows``."""

    lengths: Sequence[int]
    images: Sequence[int]
    capacity: int
    num_image_tokens: int

    def rows(self, start: Sequence[Sequence[int]], capacity: int | None = None) -> EvenRows:
        capacity = capacity or self.capacity
        return EvenRows(start, self.lengths, self.images, capacity, self.num_image_tokens)

    def few_rows(self, unit: int) -> EvenRows:
        """Rows that fit: the smallest multiple of ``unit`` that is found, or one per sample."""

        def rows_of(units: int) -> int:
            return min(units * unit, len(self.lengths))

        def spread(units: int) -> EvenRows:
            rows = self.rows(spread_evenly(self.lengths, rows_of(units)))
            rows.shorten(_TO_FIT)
            return rows

        packed = best_fit_decreasing(self.lengths, self.capacity)
        # No packing has fewer rows than these; best fit decreasing has found one with so many.
        long = sum(2 * length > self.capacity for length in self.lengths)
        least = math.ceil(max(math.ceil(sum(self.lengths) / self.capacity), long) / unit)
        enough = math.ceil(len(packed) / unit)
        rows = spread(enough)
        if not rows.fits:
            rows = self.rows(split_to_count(packed, self.lengths, rows_of(enough)))
        while least < enough:
            middle = (least + enough) // 2
            fewer = spread(middle)
            if fewer.fits:
                rows, enough = fewer, middle
            else:
                least = middle + 1
        return rows

    def rows_by_rank(self, num_ranks: int, number: int) -> list[list[list[int]]] | None:
        """Even ranks first, then each rank's samples in ``number`` rows; None if they do not fit.

        Where rows have room, ranks become more even than from even rows: a row with one long
        sample is balanced by the rank's other rows.
        """
        ranks = self.rows(spread_evenly(self.lengths, num_ranks), number * self.capacity)
        ranks.even_out(_TO_EVEN)
        dealt = []
        for own in ranks.rows:
            if len(own) < number:
                return None
            start = spread_evenly([self.lengths[i] for i in own], number)
            rows = self.rows([[own[i] for i in row] for row in start])
            rows.shorten(_TO_FIT)
            if not rows.fits:
                return None
            dealt.append([rows.rows[row] for row in _longest_first(rows)])
        return dealt


def _deal(rows: EvenRows, num_ranks: int, num_image_tokens: int) -> list[list[list[int]]]:
    """Rows of similar length to the ranks at a time, the longest to the rank that has least."""
    sizes = (rows.tokens + num_image_tokens * rows.images).tolist()
    order = _longest_first(rows)
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    dealt = [0] * num_ranks
    for first in range(0, len(order), num_ranks):
        by_need = sorted(range(num_ranks), key=lambda rank: (dealt[rank], rank))
        for rank, row in zip(by_need, order[first : first + num_ranks], strict=True):
            ranks[rank].append(rows.rows[row])
            dealt[rank] += sizes[row]
    return ranks


def _longest_first(rows: EvenRows) -> list[int]:
    order: list[int] = np.lexsort((-rows.images, -rows.tokens)).tolist()
    return order
