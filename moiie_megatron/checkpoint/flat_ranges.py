"""A contiguous range of a parameter's values as boxes of the tensors in a checkpoint.

The distributed optimizer owns ranges of flattened parameters, which begin and end anywhere; a
checkpoint holds tensors of the parameters' shapes, in boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A box of a strided view, and where its values lie in the storage.

    Attributes:
        offsets: First index of the box along every axis of the view.
        sizes: Its size along every axis.
        stride: Of the view, in values.
        first: Position in the storage of its first value.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    first: int

    def view(self, flat: Tensor, start: int) -> Tensor:
        """The box as a view of ``flat``, which holds the storage's values from ``start`` on."""
        position = flat.storage_offset() + self.first - start
        return flat.as_strided(self.sizes, self.stride, position)


def boxes_of_view(view: Tensor, start: int, stop: int) -> Iterator[Box]:
    """The boxes of a view whose values lie at the positions ``start`` to ``stop`` of its storage.

    Args:
        view: Of any device (its values are not looked at).  No two of its values share a
            position, and no two of its rows (along any axis) are interleaved: true of everything
            that ``chunk``, ``narrow``, ``view`` and ``transpose`` make of a contiguous tensor.

    Yields:
        At most ``2 n - 1`` boxes for n axes; none overlap.
    """
    extent = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    # An axis of size 1 may have any stride.
    stride = [s if n > 1 else extent for n, s in zip(view.shape, view.stride(), strict=True)]
    # In this order of the axes the values lie in the storage as those of a contiguous tensor do.
    order = sorted(range(view.dim()), key=lambda axis: -stride[axis])
    shape = [view.shape[axis] for axis in order]
    sorted_stride = [stride[axis] for axis in order]
    _check_nested(shape, sorted_stride)
    first = int(view.storage_offset())
    begin = _values_before(start - first, shape, sorted_stride)
    end = _values_before(stop - first, shape, sorted_stride)
    for offsets, sizes in boxes_of_range(shape, begin, end):
        position = first + sum(o * s for o, s in zip(offsets, sorted_stride, strict=True))
        yield Box(_restored(offsets, order), _restored(sizes, order), view.stride(), position)


def boxes_of_range(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that hold the values ``start`` to ``stop`` in row-major order.

    Yields:
        At most ``2 n - 1`` boxes for n axes, in order.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start % row:
        yield from _in_row(shape, first - 1, start % row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if stop % row:
        yield from _in_row(shape, last, 0, stop % row)


def _in_row(
    shape: Sequence[int], index: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in boxes_of_range(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)


def _values_before(position: int, shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many values lie before a position, counted from the view's first."""
    if position <= 0:
        return 0
    if not shape:
        return 1
    rows, values = position // stride[0], math.prod(shape[1:])
    if rows >= shape[0]:
        return shape[0] * values
    return rows * values + _values_before(position - rows * stride[0], shape[1:], stride[1:])


def _check_nested(shape: Sequence[int], stride: Sequence[int]) -> None:
    extent = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        assert size == 1 or step >= extent, (
            f"rows of {tuple(shape)} with {tuple(stride)} interleave"
        )
        extent = max(extent, size * step)


def _restored(values: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    by_axis = dict(zip(order, values, strict=True))
    return tuple(by_axis[axis] for axis in range(len(order)))


def meta_like(parameter: Tensor) -> Tensor:
    """A contiguous tensor without values; views of it tell their positions in a parameter."""
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
