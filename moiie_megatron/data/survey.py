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

from moiie_megatron.data.dataset import Source
from moiie_megatron.data.encode import Encoded, encode
from moiie_megatron.data.faults import Fault
from moiie_megatron.data.records import BadRecord, Record
from moiie_megatron.data.templates import Template
from moiie_megatron.data.tokenizers import Tokenizer

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
class Survey:
    """The samples of one source.

    Attributes:
        lengths: int32 [n], tokens before anything is cut off; 0 where they cannot be counted.
        images: int32 [n], images that the record names; 0 where it cannot be read.
        faults: Records that training would leave out, in order.
    """

    source: Source
    lengths: np.ndarray
    images: np.ndarray
    faults: tuple[Fault, ...]

    @property
    def bad_share(self) -> float:
        return len(self.faults) / len(self.lengths)


def survey(
    source: Source,
    encoding: Encoding | None,
    *,
    decode_images: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Read a whole source.

    Args:
        encoding: None leaves out lengths.
        decode_images: Decode every image as training does, or do not look at images at all.
        workers: Processes; 1 works in this one.
        progress: Called with the records done and their total.

    Raises:
        ValueError: A process was killed.
    """
    total = len(source.records)
    lengths, images = np.zeros(total, np.int32), np.zeros(total, np.int32)
    faults: list[Fault] = []
    done = 0
    for rows in _portions(_Measure(source, encoding, decode_images), total, workers):
        for length, num_images, fault in rows:
            lengths[done], images[done] = length, num_images
            if fault is not None:
                faults.append(fault)
            done += 1
        if progress is not None:
            progress(done, total)
    return Survey(source, lengths, images, tuple(faults))


_Row = tuple[int, int, "Fault | None"]  # tokens, images, what is wrong


@dataclass(frozen=True)
class _Measure:
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
            return length, num_images, Fault(str(self.source.records.path), i, error.reason)
        return length, num_images, None


def _portions(measure: _Measure, total: int, workers: int) -> Iterator[list[_Row]]:
    portions = [range(i, min(i + _PORTION, total)) for i in range(0, total, _PORTION)]
    if workers == 1:
        yield from map(measure, portions)
        return
    context = multiprocessing.get_context("fork")  # workers inherit the tokenizer, already read
    try:
        with ProcessPoolExecutor(workers, context, _adopt, (measure,)) as pool:
            yield from pool.map(_measure_portion, portions)
    except BrokenProcessPool as error:
        raise ValueError(
            f"A process that read {measure.source.records.path} was killed, most often for lack "
            "of memory: use fewer workers."
        ) from error


class _Process:
    """What a worker process has to do; set once, when it starts."""

    measure: _Measure


def _adopt(measure: _Measure) -> None:
    _Process.measure = measure


def _measure_portion(portion: range) -> list[_Row]:
    return _Process.measure(portion)
