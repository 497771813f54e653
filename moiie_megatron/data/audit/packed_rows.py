"""How many rows the samples of a source fill when they are packed."""

from __future__ import annotations

from collections import Counter

import numpy as np


def rows_needed(lengths: np.ndarray, capacity: int) -> int:
    """Number of rows of ``capacity`` tokens that hold all samples, truncated to the capacity.

    Best fit decreasing over the counts of equal lengths, so millions of samples take a moment:
    close to the fewest rows possible, and about what packing reaches within large steps.

    Args:
        lengths: int (r,), tokens of every sample; 0 for samples that are skipped.
        capacity: Maximum number of tokens of a row.
    """
    free: Counter[int] = Counter()  # number of rows by the room that they still have
    rows = 0
    counts = Counter(np.minimum(lengths[lengths > 0], capacity).tolist())
    for length in sorted(counts, reverse=True):
        left = counts[length]
        for room in sorted(room for room in free if room >= length):
            left = _fill(free, room, length, left)
        new = -(-left // (capacity // length))
        rows += new
        free[capacity] += new
        _fill(free, capacity, length, left)
        free = +free  # drops the entries that are 0
    return rows


def _fill(free: Counter[int], room: int, length: int, count: int) -> int:
    """Put ``count`` samples of one length into the rows with that room.

    Returns:
        How many samples are left.
    """
    per_row = room // length
    full = min(free[room], count // per_row)
    free[room] -= full
    free[room - per_row * length] += full
    count -= full * per_row
    if count and free[room]:  # fewer samples than fit into one row
        free[room] -= 1
        free[room - count * length] += 1
        count = 0
    return count
