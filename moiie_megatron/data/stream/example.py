"""One sample, encoded and decoded, as workers hand it on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moiie_megatron.data.encode.encoder import Encoded


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was skipped: record number ``index`` of ``file``, and why."""

    file: str
    index: int
    reason: str


@dataclass(frozen=True)
class Example:
    """One sample with its pixels.

    Attributes:
        encoded: Ids, labels, token types.
        images: uint8 [k, 3, S, S], k = 0 for text only.
        record_id: For messages and predictions.
        skipped_samples: Samples that this one replaces.
    """

    encoded: Encoded
    images: Tensor
    record_id: str
    skipped_samples: tuple[SkippedSample, ...] = ()
