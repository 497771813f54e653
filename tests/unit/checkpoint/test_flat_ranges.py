"""Ranges of a parameter as boxes: every value once, and not too many boxes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moiie_megatron.checkpoint.flat_ranges import boxes_of_range, boxes_of_view

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda t: t,
    "half of the rows": lambda t: t.chunk(2, 0)[1],
    "half of the columns": lambda t: t.chunk(2, 1)[1],
    "one row": lambda t: t[2],
    "transposed": lambda t: t.transpose(0, 1),
    "transposed half": lambda t: t.transpose(0, 1).chunk(2, 0)[0],
    "an axis of size 1 in front": lambda t: t[None],
    "an axis of size 1 with another stride": lambda t: t[1:2].transpose(0, 1),
}


@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 4, 5), (2, 3, 1, 4)])
def test_boxes_hold_a_range_in_order(shape: tuple[int, ...]) -> None:
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(values.numel() + 1):
        for stop in range(start, values.numel() + 1):
            boxes = list(boxes_of_range(shape, start, stop))
            assert len(boxes) <= 2 * len(shape) - 1
            found = [
                values[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                for offsets, sizes in boxes
            ]
            held = torch.cat([f.flatten() for f in found]) if found else values.flatten()[:0]
            assert held.tolist() == list(range(start, stop))


def test_a_scalar_is_one_box() -> None:
    assert list(boxes_of_range((), 0, 1)) == [((), ())]
    assert list(boxes_of_range((), 1, 1)) == []


@pytest.mark.parametrize("name", VIEWS)
def test_boxes_of_a_view_hold_what_lies_in_the_range(name: str) -> None:
    """As the optimizer has it: a flat tensor with the storage's values from ``start`` on."""
    parameter = torch.arange(24).view(4, 6)
    view = VIEWS[name](parameter)
    draw = random.Random(name)
    for _ in range(50):
        start, stop = sorted(draw.sample(range(25), 2))
        own = parameter.flatten()[start:stop].clone()
        held = torch.full_like(view, -1)
        for box in boxes_of_view(view, start, stop):
            at = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            assert (held[at] == -1).all()
            held[at] = box.view(own, start)
        inside = (view >= start) & (view < stop)
        assert torch.equal(held, torch.where(inside, view, -1))


def test_boxes_lie_in_a_part_of_a_larger_storage() -> None:
    """The main parameters of fp32 models are views of the model's own."""
    parameter = torch.arange(100, 124).view(4, 6)
    own = parameter.flatten()[5:14]
    found = [box.view(own, 5) for box in boxes_of_view(parameter, 5, 14)]
    assert torch.cat([f.flatten() for f in found]).tolist() == list(range(105, 114))


def test_interleaved_rows_are_refused() -> None:
    with pytest.raises(AssertionError, match="interleave"):
        list(boxes_of_view(torch.arange(24).as_strided((2, 3), (3, 2)), 0, 24))
