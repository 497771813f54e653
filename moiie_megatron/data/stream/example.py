"""One encoded sample with its pixels, as worker processes hand it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moiie_megatron.data.encode.encoder import IGNORE, Encoded
from moiie_megatron.data.records.record import Record
from moiie_megatron.layout.token_types import PADDING

_FILLER_LENGTH: Final = 8  # tokens


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was skipped: record number ``index`` (from 0) of ``file``, and the reason."""

    file: str
    index: int
    reason: str


@dataclass(frozen=True)
class Notice:
    """Something about a sample that was used, which its source should be told.

    Attributes:
        source: Name of the source.
        what: A phrase, the same for all samples of a kind.
    """

    source: str
    what: str


@dataclass(frozen=True)
class Example:
    """One sample with its pixels (shapes: ``moiie_megatron/data/__init__.py``).

    Attributes:
        encoded: Token ids, labels and token types.
        images: uint8 (i, 3, S, S); i is 0 for text only.
        record_id: For messages and predictions.
        skipped_samples: Samples that were skipped before this one replaced them.
        notices: What was noticed about this sample.
    """

    encoded: Encoded
    images: Tensor
    record_id: str
    skipped_samples: tuple[SkippedSample, ...] = ()
    notices: tuple[Notice, ...] = ()


def notices(record: Record, encoded: Encoded, source: str) -> tuple[Notice, ...]:
    """What a sample says of its source: what is not read of its record, and special tokens."""
    markers = [
        f"{marker} in the text becomes a special token (data.markers_in_text=text keeps it as text)"
        for marker in encoded.markers
    ]
    return tuple(Notice(source, what) for what in (*record.notes, *markers))


def filler(
    pad_id: int, image_size: int, skipped_samples: tuple[SkippedSample, ...] = ()
) -> Example:
    """A sample of padding without id, which fills a micro-batch that lacks samples.

    Its first token has a label: kernels for the loss need not cope with no label at all.

    Args:
        pad_id: Token at padded positions.
        image_size: Height and width of the images that it has none of.
        skipped_samples: What it stands for.
    """
    tokens = torch.full((_FILLER_LENGTH,), pad_id)
    labels = torch.full_like(tokens, IGNORE)
    labels[0] = pad_id
    encoded = Encoded(tokens, labels, torch.full_like(tokens, PADDING, dtype=torch.int8), ())
    pixels = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    return Example(encoded, pixels, "", skipped_samples)
