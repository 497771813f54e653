"""One encoded sample with its pixels, as worker processes hand it on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moiie_megatron.data.encode.encoder import Encoded


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was skipped: record number ``index`` (from 0) of ``file``, and the reason."""

    file: str
    index: int
    reason: str


@dataclass(frozen=True)
class Example:
    """One sample with its pixels (shapes: ``moiie_megatron/data/__init__.py``).

    Attributes:
        encoded: Token ids, labels and token types.
        images: uint8 (i, 3, S, S); i is 0 for text only.
        record_id: For messages and predictions.
        skipped_samples: Samples that were skipped before this one replaced them.
    """

    encoded: Encoded
    images: Tensor
    record_id: str
    skipped_samples: tuple[SkippedSample, ...] = ()
