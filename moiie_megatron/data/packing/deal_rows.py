"""Which samples of a global batch share a row, and which data-parallel rank gets it.

A pure function of the samples' sizes, which all ranks compute alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

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

    Rows are as few as can be found, and even in tokens and images.  The rows of a micro-batch, one
    per rank, are of similar size: expert-parallel ranks wait for each other in every layer.

    Args:
        lengths: Tokens of every sample, 1 to ``capacity``; a multiple of ``num_ranks`` samples.
        images: Images of every sample.
        num_ranks: Number of data-parallel ranks.
        capacity: Maximum number of tokens of a row.
        num_image_tokens: Positions per image.
        rows_multiple_of: The rows of a rank are a multiple of this, unless they are one per
            sample.

    Returns:
        For every rank its rows, the largest first, each the ascending indices of its samples.
    """
    assert min(lengths) > 0 and max(lengths) <= capacity, (min(lengths), max(lengths), capacity)
    assert len(lengths) % num_ranks == 0, (len(lengths), num_ranks)
    unit = num_ranks * rows_multiple_of

    def rows_of(units: int) -> int:
        return min(units * unit, len(lengths))

    def spread(units: int) -> EvenRows:
        start = spread_evenly(lengths, rows_of(units))
        rows = EvenRows(start, lengths, images, capacity, num_image_tokens)
        rows.shorten(_TO_FIT)
        return rows

    packed = best_fit_decreasing(lengths, capacity)
    # No packing has fewer rows than these; best fit decreasing has found one with so many.
    long = sum(2 * length > capacity for length in lengths)
    least = math.ceil(max(math.ceil(sum(lengths) / capacity), long) / unit)
    enough = math.ceil(len(packed) / unit)
    rows = spread(enough)
    if not rows.fits:
        start = split_to_count(packed, lengths, rows_of(enough))
        rows = EvenRows(start, lengths, images, capacity, num_image_tokens)
    while least < enough:
        middle = (least + enough) // 2
        fewer = spread(middle)
        if fewer.fits:
            rows, enough = fewer, middle
        else:
            least = middle + 1
    rows.even_out(_TO_EVEN)
    return _deal(rows, num_ranks, num_image_tokens)


def _deal(rows: EvenRows, num_ranks: int, num_image_tokens: int) -> list[list[list[int]]]:
    """Rows of similar size to the ranks at a time, the largest to the rank that has least."""
    sizes = (rows.tokens + num_image_tokens * rows.images).tolist()
    order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    dealt = [0] * num_ranks
    for first in range(0, len(order), num_ranks):
        by_need = sorted(range(num_ranks), key=lambda rank: (dealt[rank], rank))
        for rank, row in zip(by_need, order[first : first + num_ranks], strict=True):
            ranks[rank].append(sorted(rows.rows[row]))
            dealt[rank] += sizes[row]
    return ranks
