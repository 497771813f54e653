"""What a packed row is, by hand and by properties."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec, pack_row
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Example
from tests.unit.data.stream.streams import example, text

SPEC = PackingSpec(capacity=12, sequence_length=8, num_image_tokens=2, pad_id=3)
CHECKS = settings(max_examples=60, deadline=None, derandomize=True)


def test_a_sample_longer_than_a_row() -> None:
    for make in (pack, pack_row):
        with pytest.raises(AssertionError, match="13, 12"):
            make([text(13, "a")], SPEC)
    with pytest.raises(AssertionError, match="12, 8"):
        dataclasses.replace(SPEC, multiple_of=8)


def three() -> list[Example]:
    return [
        example([1, 99, 99, 5], [0, 1, 1, 0], 1, "a"),
        text(10, "b"),
        example([1, 99, 99, 99, 99, 7, 8], [0, 1, 1, 1, 1, 0, 0], 2, "c"),
    ]


def test_a_packed_row_by_hand() -> None:
    first, second = pack(three(), dataclasses.replace(SPEC, multiple_of=4))
    assert first.tokens.tolist() == [[1, 99, 99, 5, 1, 99, 99, 99, 99, 7, 8, 3]]
    assert first.labels.tolist() == [[-100, 99, 5, -100, -100, 99, 99, 99, 7, 8, -100, -100]]
    assert first.token_types.tolist() == [[0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 2]]
    assert first.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0]]
    assert first.images[:, 0, 0, 0].tolist() == [4, 7, 7]
    assert first.record_ids == ("a", "c")
    assert [skipped.index for skipped in first.skipped_samples] == [4, 7]
    assert first.cu_seqlens is not None and first.cu_seqlens.tolist() == [0, 4, 11, 12]
    assert second.record_ids == ("b",) and second.images.shape == (0, 3, 4, 4)
    assert second.cu_seqlens is not None and second.cu_seqlens.tolist() == [0, 10, 12]
    dtypes = [t.dtype for t in (first.tokens, first.token_types, first.cu_seqlens, first.images)]
    assert dtypes == [torch.int64, torch.int8, torch.int32, torch.uint8]


def test_lengths_of_rows() -> None:
    exact = pack(three(), SPEC)
    assert [row.tokens.shape for row in exact] == [(1, 11), (1, 10)]
    assert exact[0].cu_seqlens is not None and exact[0].cu_seqlens.tolist() == [0, 4, 11]
    full = PackingSpec(24, 8, num_image_tokens=2, pad_id=3, pad_to_capacity=True)
    (row,) = pack([text(5, "a")], full)
    # No segment, and so no position, is longer than a sample may be.
    assert row.cu_seqlens is not None and row.cu_seqlens.tolist() == [0, 5, 13, 21, 24]
    assert row.position_ids.tolist() == [[*range(5), *range(8), *range(8), *range(3)]]
    assert row.tokens.shape == (1, 24) and row.token_types.sum() == 2 * 19


@st.composite
def portions(draw: st.DrawFn) -> tuple[list[Example], PackingSpec]:
    """Samples with text and images of two tokens each, and rows that they fit into."""
    samples = []
    for number in range(draw(st.integers(1, 12))):
        runs = draw(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=4))
        types = [t for words, image in runs for t in [0] * words + [1] * (2 * image)] + [0]
        tokens = [number * 100 + position for position in range(len(types))]
        samples.append(example(tokens, types, sum(image for _, image in runs), f"r{number}"))
    longest = max(len(sample.encoded.tokens) for sample in samples)
    multiple_of = draw(st.sampled_from([1, 2, 4]))
    sequence_length = -(-(longest + draw(st.integers(0, 8))) // multiple_of) * multiple_of
    spec = PackingSpec(
        sequence_length * draw(st.integers(1, 3)),
        sequence_length,
        num_image_tokens=2,
        pad_id=3,
        multiple_of=multiple_of,
        pad_to_capacity=draw(st.booleans()),
    )
    return samples, spec


def segments(rows: list[Batch]) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Tokens, labels and types of every sample, read back from its segment."""
    found = {}
    for row in rows:
        assert row.cu_seqlens is not None
        cuts = row.cu_seqlens.tolist()
        assert cuts[0] == 0 and cuts[-1] == row.tokens.shape[1] and cuts == sorted(set(cuts))
        for name, start, end in zip(row.record_ids, cuts, cuts[1:], strict=False):
            assert row.position_ids[0, start:end].tolist() == list(range(end - start))
            parts = (row.tokens, row.labels, row.token_types)
            found[name] = tuple(part[0, start:end].tolist() for part in parts)
    return found  # type: ignore[return-value]


@CHECKS
@given(portions())
def test_every_sample_is_in_one_segment(portion: tuple[list[Example], PackingSpec]) -> None:
    samples, spec = portion
    rows = pack(samples, spec)
    expected = {
        sample.record_id: (
            sample.encoded.tokens.tolist(),
            sample.encoded.labels.tolist(),
            sample.encoded.token_types.tolist(),
        )
        for sample in samples
    }
    skipped = Counter(one for sample in samples for one in sample.skipped_samples)
    names = [name for row in rows for name in row.record_ids]
    assert Counter(names) == Counter(expected.keys())
    assert segments(rows) == expected
    assert Counter(one for row in rows for one in row.skipped_samples) == skipped
    for row in rows:
        length = row.tokens.shape[1]
        assert length <= spec.capacity and length % spec.multiple_of == 0
        assert length == spec.capacity or not spec.pad_to_capacity
        assert int(row.position_ids.max()) < spec.sequence_length
        assert row.record_ids  # no row is padding alone
        # The pixels say which sample an image is of.
        owners = [s for name in row.record_ids for s in samples if s.record_id == name]
        assert torch.equal(row.images, torch.cat([s.images for s in owners]))
