"""What is in a source: every record read, measured and, if wanted, its images decoded.

Samples are measured by the code that training uses: what passes here is used there.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Final

import numpy as np

from moiie_megatron.data.encode.encoder import Encoded, encode
from moiie_megatron.data.encode.templates import Template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.llava import BadRecord, Record
from moiie_megatron.data.stream.dataset import Source
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.utils.errors import UserError

_PORTION: Final = 256  # records that a process takes at a time
_UNLIMITED: Final = 2**40


@dataclass(frozen=True)
class Encoding:
    """What the length of a sample depends on, and the limit that it is held against."""

    tokenizer: Tokenizer
    template: Template
    num_image_tokens: int
    sequence_length: int

    def length(self, record: Record) -> int:
        """Tokens of a record before anything is cut off.

        Raises:
            BadRecord: The template cannot express it.
        """
        return len(self._encode(record, _UNLIMITED).tokens)

    def check_cut(self, record: Record) -> None:
        """See that enough is left within the sequence length.

        Raises:
            BadRecord: An image or every answer lies beyond it.
        """
        self._encode(record, self.sequence_length)

    def _encode(self, record: Record, limit: int) -> Encoded:
        return encode(record, self.tokenizer, self.template, self.num_image_tokens, limit)


@dataclass(frozen=True)
class Audit:
    """The samples of one source.

    Attributes:
        lengths: int32 [n], tokens before anything is cut off; 0 where they cannot be counted.
        images: int32 [n], images that the record names; 0 where it cannot be read.
        faults: Records that training would leave out, in order.
    """

    source: Source
    lengths: np.ndarray
    images: np.ndarray
    skipped_samples: tuple[SkippedSample, ...]

    @property
    def skipped_fraction(self) -> float:
        return len(self.skipped_samples) / len(self.lengths)


def audit(
    source: Source,
    encoding: Encoding | None,
    *,
    decode_images: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Read a whole source.

    Args:
        encoding: None leaves out lengths.
        decode_images: Decode every image as training does, or do not look at images at all.
        workers: Processes; 1 works in this one.
        progress: Called with the records done and their total.

    Raises:
        UserError: A process was killed.
    """
    total = len(source.records)
    lengths, images = np.zeros(total, np.int32), np.zeros(total, np.int32)
    skipped_samples: list[SkippedSample] = []
    done = 0
    for rows in _portions(_Worker(source, encoding, decode_images), total, workers):
        for length, num_images, fault in rows:
            lengths[done], images[done] = length, num_images
            if fault is not None:
                skipped_samples.append(fault)
            done += 1
        if progress is not None:
            progress(done, total)
    return Audit(source, lengths, images, tuple(skipped_samples))


_Row = tuple[int, int, "SkippedSample | None"]  # tokens, images, what is wrong


@dataclass(frozen=True)
class _Worker:
    source: Source
    encoding: Encoding | None
    decode_images: bool

    def __call__(self, portion: range) -> list[_Row]:
        return [self._measure(i) for i in portion]

    def _measure(self, i: int) -> _Row:
        length = num_images = 0
        try:
            record = self.source.records[i]
            num_images = len(record.images)
            if self.encoding is not None:
                length = self.encoding.length(record)
                if length > self.encoding.sequence_length:
                    self.encoding.check_cut(record)
            for path in record.images if self.decode_images else ():
                self.source.images.load(path)
        except BadRecord as error:
            return length, num_images, SkippedSample(str(self.source.records.path), i, error.reason)
        return length, num_images, None


def _portions(measure: _Worker, total: int, workers: int) -> Iterator[list[_Row]]:
    portions = [range(i, min(i + _PORTION, total)) for i in range(0, total, _PORTION)]
    if workers == 1:
        yield from map(measure, portions)
        return
    context = multiprocessing.get_context("fork")  # workers inherit the tokenizer, already read
    try:
        with ProcessPoolExecutor(workers, context, _init_worker, (measure,)) as pool:
            yield from pool.map(_measure_portion, portions)
    except BrokenProcessPool as error:
        raise UserError(
            f"A process that read {measure.source.records.path} was killed, most often for lack "
            "of memory: use fewer workers."
        ) from error


class _Process:
    """What a worker process has to do; set once, when it starts."""

    measure: _Worker


def _init_worker(measure: _Worker) -> None:
    _Process.measure = measure


def _measure_portion(portion: range) -> list[_Row]:
    return _Process.measure(portion)
