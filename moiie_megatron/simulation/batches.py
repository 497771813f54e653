"""Micro-batches of given shapes."""

from __future__ import annotations

import torch

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape


def make_batch(config: RunConfig, shape: MicroBatchShape) -> Batch:
    """A micro-batch with these samples: images first, then text, whose last tokens have labels.

    All tensors have values but the images, which are made as any new tensor is.
    """
    rows = [_row(config, samples, shape.length) for samples in shape.rows]
    tokens, labels, positions, types = (torch.stack(parts) for parts in zip(*rows, strict=True))
    side = config.vision.image_size
    boundaries = None
    if config.data.packing:
        lengths = [sample.tokens for sample in shape.rows[0]]
        rest = shape.length - sum(lengths)
        ends = torch.tensor([0, *lengths, *([rest] if rest else [])]).cumsum(0)
        boundaries = ends.to(torch.int32)
    return Batch(
        tokens=tokens,
        labels=labels,
        position_ids=positions,
        token_types=types,
        images=torch.zeros(shape.images, 3, side, side, dtype=torch.uint8),
        num_image_tokens=config.vision.num_image_tokens,
        record_ids=tuple(str(number) for number, _ in enumerate(shape.samples)),
        cu_seqlens=boundaries,
    )


def _row(
    config: RunConfig, samples: tuple[SampleShape, ...], length: int
) -> tuple[torch.Tensor, ...]:
    tokens = torch.ones(length, dtype=torch.int64)
    labels = torch.full((length,), IGNORE)
    positions = torch.zeros(length, dtype=torch.int64)
    types = torch.full((length,), PADDING, dtype=torch.int8)
    start = 0
    for sample in samples:
        end = start + sample.tokens
        images = sample.images * config.vision.num_image_tokens
        types[start:end] = TEXT
        types[start : start + images] = IMAGE
        positions[start:end] = torch.arange(sample.tokens)
        labels[end - sample.labels : end] = 1
        start = end
    positions[start:] = torch.arange(length - start)
    return tokens, labels, positions, types
