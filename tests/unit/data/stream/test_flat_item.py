"""Items in one buffer: nothing of them changes, and the buffer is all that is shared."""

from __future__ import annotations

import pickle

import pytest
import torch

from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.flat_item import flatten, from_bytes, to_bytes
from tests.unit.data.stream.streams import assert_same_stream, example, text


def test_packed_rows_come_back() -> None:
    spec = PackingSpec(capacity=6, sequence_length=6, num_image_tokens=2, pad_id=3)
    samples = [example([9, 9, 8], [1, 1, 0], 1, "a"), text(5, "b"), text(1, "c"), text(4, "d")]
    rows = pack(samples, spec)
    flat = flatten(rows)
    assert flat.buffer.is_shared() and flat.buffer.dtype == torch.uint8
    restored = flat.restore()
    assert_same_stream(restored, rows)
    assert not any(row.images.is_shared() or row.tokens.is_shared() for row in restored)
    assert [row.images.shape for row in restored] == [row.images.shape for row in rows]


@pytest.mark.parametrize(
    "item",
    [
        [],
        {"a": torch.arange(3).t(), "b": [torch.ones(2, 3).t(), torch.tensor(7.0)]},
        (
            torch.empty(0, 3, 2, 2, dtype=torch.uint8),
            torch.tensor([True]),
            torch.ones(3).bfloat16(),
        ),
    ],
)
def test_any_item_comes_back(item: object) -> None:
    def listed(value: object) -> object:
        """Tensors as lists, with their types."""
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.tolist()
        if isinstance(value, dict):
            return {key: listed(inner) for key, inner in value.items()}
        return [listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    assert listed(flatten(item).restore()) == listed(item)
    # Several items in one buffer, as a rank receives them from others.
    parts = [to_bytes(item), to_bytes("text"), to_bytes(item)]
    first, _, last = torch.cat(parts).split([len(part) for part in parts])
    assert listed(from_bytes(first)) == listed(from_bytes(last)) == listed(item)


def test_without_tensors() -> None:
    error = flatten(BadRecord("why", "file", 3)).restore()
    assert (str(error), error.index) == ("file[3]: why", 3)


def test_the_tensors_are_not_in_the_pickled_part() -> None:
    flat = flatten([torch.zeros(1000), "text"])
    assert len(flat.content) < 100 and b"text" in flat.content
    assert flat.buffer.numel() == 4032  # 4000, rounded up to the next multiple of 64
    assert len(pickle.dumps(flat.layout)) < 300
