"""Rows of few or of equally long samples, by the usual rules of bin packing."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into few rows: the longest first, each into the fullest row with enough room.

    Args:
        lengths: Length of every item, at most ``capacity``.
        capacity: Maximum total length of a row.

    Returns:
        The indices of the items of every row, ascending; rows ordered by their first items.
    """
    assert max(lengths, default=0) <= capacity, (max(lengths, default=0), capacity)
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # ascending: the room and the number of every row
    for i in _longest_first(lengths):
        at = bisect_left(rooms, (lengths[i], 0))
        if at == len(rooms):
            rooms.append((capacity, len(rows)))
            rows.append([])
        room, row = rooms.pop(at)
        rows[row].append(i)
        insort(rooms, (room - lengths[i], row))
    return sorted(sorted(row) for row in rows)


def spread_evenly(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Make rows of similar length: the longest item first, each into the shortest row.

    Args:
        lengths: Length of every item, positive.
        num_rows: At most the number of items, so that no row is empty.

    Returns:
        The indices of the items of every row.
    """
    assert num_rows <= len(lengths), (num_rows, len(lengths))
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    shortest_first = [(0, row) for row in range(num_rows)]
    for i in _longest_first(lengths):
        length, row = shortest_first[0]
        rows[row].append(i)
        heapq.heapreplace(shortest_first, (length + lengths[i], row))
    return rows


def split_to_count(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], count: int
) -> list[list[int]]:
    """Split the longest rows between two items until there are ``count`` rows.

    Args:
        rows: The indices of the items of every row.
        lengths: Length of every item.
        count: At least the number of rows, at most the number of items.
    """
    assert len(rows) <= count <= sum(map(len, rows)), (len(rows), count)
    done = [list(row) for row in rows if len(row) == 1]
    longest_first = [(-sum(lengths[i] for i in row), list(row)) for row in rows if len(row) > 1]
    heapq.heapify(longest_first)
    while len(done) + len(longest_first) < count:
        _, row = heapq.heappop(longest_first)
        for half in spread_evenly([lengths[i] for i in row], 2):
            part = [row[i] for i in half]
            if len(part) == 1:
                done.append(part)
            else:
                heapq.heappush(longest_first, (-sum(lengths[i] for i in part), part))
    return done + [row for _, row in longest_first]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
