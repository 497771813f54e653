"""Reads every record of a source, measures it and, if asked, decodes its images.

Samples are encoded and decoded by the code that training uses, so the audit skips what training
would skip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.dataset import Source
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import ProgressFn

PORTION: Final = 256  # records that a worker measures at a time


@dataclass(frozen=True)
class Audit:
    """The samples of one source (shapes: ``moiie_megatron/data/__init__.py``).

    Attributes:
        source: What was read.
        lengths: int32 (r,), tokens of every record before truncation; 0 if they cannot be counted.
        images: int32 (r,), images that every record names; 0 if it cannot be parsed.
        labels: int32 (r,), tokens with a label of every record, after truncation.
        skipped_samples: Records that training would skip, in order.
        notes: What is not used of records, and of how many.
        markers: Special tokens in the text of conversations, and how many records have each.
    """

    source: Source
    lengths: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    skipped_samples: tuple[SkippedSample, ...]
    notes: Mapping[str, int] = field(default_factory=dict)
    markers: Mapping[str, int] = field(default_factory=dict)

    @property
    def skipped_fraction(self) -> float:
        """Skipped records per record, 0..1."""
        return len(self.skipped_samples) / len(self.lengths)


def audit(
    source: Source,
    encoding: Encoding | None,
    *,
    decode_images: bool = True,
    workers: int = 1,
    progress: ProgressFn | None = None,
) -> Audit:
    """Read a whole source.

    Args:
        source: Records and images.
        encoding: As in training; None does not tokenize, so all lengths and labels are 0.
        decode_images: Decode every image as training does, or do not open images at all.
        workers: Processes; 1 works in this one.
        progress: Called with the records done and their total.

    Raises:
        UserError: A worker process was killed.
    """
    total = len(source.records)
    lengths, images, labels = (np.zeros(total, np.int32) for _ in range(3))
    skipped_samples: list[SkippedSample] = []
    notes: Counter[str] = Counter()
    markers: Counter[str] = Counter()
    done = 0
    for portion in _measure_all(_Measurements(source, encoding, decode_images), workers):
        for measured in portion:
            lengths[done], labels[done] = measured.length, measured.num_labels
            images[done] = measured.num_images
            markers.update(measured.markers)
            if measured.skipped is not None:
                skipped_samples.append(measured.skipped)
            notes.update(measured.notes)
            done += 1
        if progress is not None:
            progress(done, total)
    return Audit(
        source,
        lengths,
        images,
        labels,
        tuple(skipped_samples),
        notes=dict(notes.most_common()),
        markers=dict(sorted(markers.items())),
    )


@dataclass(frozen=True)
class _Measured:
    """One record: tokens, labels, images, what is noted of it, and why it is skipped, if it is."""

    length: int
    num_labels: int
    num_images: int
    notes: tuple[str, ...]
    markers: tuple[str, ...]
    skipped: SkippedSample | None


class _Measurements(Dataset[Any]):
    """Map-style dataset: item i holds the measurements of the i-th portion of the records."""

    def __init__(self, source: Source, encoding: Encoding | None, decode_images: bool) -> None:
        self.source = source
        self._encoding = encoding
        self._decode_images = decode_images

    def __len__(self) -> int:
        return -(-len(self.source.records) // PORTION)

    def __getitem__(self, portion: int) -> list[_Measured]:
        first = portion * PORTION
        last = min(first + PORTION, len(self.source.records))
        return [self._measure(i) for i in range(first, last)]

    def _measure(self, i: int) -> _Measured:
        length = num_labels = num_images = 0
        notes: tuple[str, ...] = ()
        markers: tuple[str, ...] = ()
        try:
            record = self.source.records[i]
            num_images, notes = len(record.images), record.notes
            if self._encoding is not None:
                length, num_labels = self._encoding.measure(record)
                markers = self._encoding.markers(record)
                if length > self._encoding.sequence_length:
                    self._encoding.encode(record)  # refuses a record that truncation spoils
            for path in record.images if self._decode_images else ():
                self.source.images.load(path)
        except BadRecord as error:
            skipped = SkippedSample(str(self.source.records.path), i, error.reason)
            return _Measured(length, num_labels, num_images, notes, markers, skipped)
        return _Measured(length, num_labels, num_images, notes, markers, None)


def _measure_all(measurements: _Measurements, workers: int) -> Iterator[list[_Measured]]:
    """The measurements of all portions, in order."""
    num_workers = workers if workers > 1 else 0
    loader: DataLoader[Any] = DataLoader(
        measurements,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        # Forked workers inherit the tokenizer, which takes seconds to load.
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),  # its own: the default would draw from the global one
    )
    try:
        yield from loader
    except RuntimeError as error:
        # torch has no class of its own for this; a worker's exception has another message.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            f"A process that read {measurements.source.records.path} was killed, most often for "
            "lack of memory: use fewer --workers."
        ) from error.with_traceback(None)  # its frames would keep the other workers alive


def _unchanged(item: Any) -> Any:
    return item
