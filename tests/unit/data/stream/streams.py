"""Streams over the small corpus, and samples by hand, for the tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from moiie_megatron.data.encode.encoder import Encoded
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.example import Example, SkippedSample
from moiie_megatron.data.stream.loader import build_loader
from moiie_megatron.data.stream.settings import LoaderSettings

GLOBAL, MICRO, STEPS = 8, 2, 5  # 40 samples of 23: nearly two epochs
FIELDS = ("tokens", "labels", "position_ids", "token_types", "images")


def settings(**changes: object) -> LoaderSettings:
    """Settings of one rank and ``STEPS`` steps."""
    defaults = LoaderSettings(
        seed=7,
        global_batch_size=GLOBAL,
        micro_batch_size=MICRO,
        dp_rank=0,
        dp_size=1,
        num_steps=STEPS,
    )
    return replace(defaults, **changes)  # type: ignore[arg-type]


def stream(dataset: LlavaDataset, **changes: object) -> Iterator[Batch]:
    make = partial(collate, pad_id=dataset.pad_id, num_image_tokens=dataset.num_image_tokens)
    return build_loader(dataset, settings(**changes), make)


def run(dataset: LlavaDataset, dp_size: int = 1, **changes: object) -> list[Batch]:
    """All micro-batches of a run in global order, whatever the number of ranks."""
    ranks = [list(stream(dataset, dp_rank=r, dp_size=dp_size, **changes)) for r in range(dp_size)]
    return [batch for together in zip(*ranks, strict=True) for batch in together]


def assert_same(got: Batch, expected: Batch) -> None:
    """Every tensor, the ids, and for packed rows the boundaries; not the skipped samples."""
    assert got.record_ids == expected.record_ids
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert (got.cu_seqlens is None) == (expected.cu_seqlens is None)
    if got.cu_seqlens is not None and expected.cu_seqlens is not None:
        assert torch.equal(got.cu_seqlens, expected.cu_seqlens)


def assert_same_stream(got: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert [b.record_ids for b in got] == [b.record_ids for b in expected]
    for a, b in zip(got, expected, strict=True):
        assert a.skipped_samples == b.skipped_samples
        assert_same(a, b)


def example(tokens: list[int], types: list[int], images: int, name: str = "r") -> Example:
    """A sample whose images have the number of its tokens as pixels, 4 x 4 of them."""
    labels = [-100, *tokens[2:], -100] if len(tokens) > 1 else [-100]
    encoded = Encoded(
        torch.tensor(tokens),
        torch.tensor(labels),
        torch.tensor(types, dtype=torch.int8),
        ("x",) * images,
    )
    pixels = torch.full((images, 3, 4, 4), len(tokens), dtype=torch.uint8)
    return Example(encoded, pixels, name, (SkippedSample("f", len(tokens), "why"),))


def text(length: int, name: str) -> Example:
    return example(list(range(length)), [0] * length, 0, name)
