"""The bytes of a tensor, wherever they lie: moved and hashed in small blocks, never held whole.

Weights have the same rows in both formats, at most in another order: a conversion moves them from
file to file through one buffer that stays in the processor's cache, and hashes them on the way.
Neither a mapping nor a tensor in memory is needed, whose pages cost more time than the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Final

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128

from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.digest import tensor_bytes
from moiie_megatron.utils.errors import UserError

# Bytes that are read, hashed and written at a time: as many as cp takes.  They stay in the cache of
# the processor; with 512 kB the kernel took longer to find memory for what is written.
BLOCK: Final = 1 << 18


@dataclass(frozen=True)
class FileRange:
    """Consecutive bytes of a file."""

    file: Path
    offset: int
    length: int

    def part(self, offset: int, length: int) -> FileRange:
        """``length`` bytes of it, from ``offset`` on."""
        assert offset >= 0 and offset + length <= self.length
        return FileRange(self.file, self.offset + offset, length)

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes in order, read into ``buffer``: each block is valid until the next.

        Raises:
            UserError: The file is missing, unreadable or cut off.
        """
        left = self.length
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.offset)
                while left:
                    count = stream.readinto(buffer[:left])
                    if not count:
                        raise UserError(f"{self.file} is cut off: copy it again.")
                    left -= count
                    yield buffer[:count]
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error}): copy it again.") from error


Part = FileRange | memoryview


class TensorBytes:
    """The values of a tensor in row-major order.

    Args:
        info: Shape and dtype.
        parts: One behind the other they are the tensor.
    """

    def __init__(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        assert sum(map(_length, parts)) == info.num_bytes, info
        self.info = info
        self.parts = tuple(parts)
        self._digest: str | None = None

    @classmethod
    def of(cls, data: Tensor | TensorBytes) -> TensorBytes:
        """Of a tensor in memory; what is already of this kind stays as it is."""
        if isinstance(data, TensorBytes):
            return data
        return cls(TensorInfo.of(data), [tensor_bytes(data)])

    @property
    def digest(self) -> str:
        """XXH3-128 as hexadecimal digits; reads the bytes if nobody has yet."""
        if self._digest is None:
            digest = xxh3_128()
            for block in self.blocks():
                digest.update(block)
            self._digest = digest.hexdigest()
        return self._digest

    def write_to(self, stream: IO[bytes], *, is_hashed: bool) -> None:
        """Append the bytes to ``stream``.

        Args:
            is_hashed: Hash them on the way if they have not been yet: ``digest`` then need not
                read them.
        """
        digest = xxh3_128() if is_hashed and self._digest is None else None
        for block in self.blocks():
            stream.write(block)
            if digest is not None:
                digest.update(block)
        if digest is not None:
            self._digest = digest.hexdigest()

    def blocks(self) -> Iterator[memoryview]:
        """The bytes in order, at most ``BLOCK`` at a time; each block is valid until the next.

        Raises:
            UserError: A file that is missing, unreadable or cut off.
        """
        buffer = memoryview(bytearray(min(BLOCK, max(map(_length, self.parts), default=0))))
        for part in self.parts:
            if isinstance(part, FileRange):
                yield from part.blocks(buffer)
            else:
                yield from (part[start : start + BLOCK] for start in range(0, len(part), BLOCK))

    def tensor(self) -> Tensor:
        """Read it into memory."""
        tensor = torch.empty(self.info.shape, dtype=self.info.dtype)
        target, done = tensor_bytes(tensor), 0
        for block in self.blocks():
            target[done : done + len(block)] = block
            done += len(block)
        return tensor

    def split(self, infos: Sequence[TensorInfo]) -> list[TensorBytes]:
        """Consecutive tensors out of the bytes, which they use up."""
        assert sum(info.num_bytes for info in infos) == self.info.num_bytes
        ends = list(accumulate(info.num_bytes for info in infos))
        return [
            TensorBytes(info, _cut(self.parts, end - info.num_bytes, info.num_bytes))
            for info, end in zip(infos, ends, strict=True)
        ]


Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def transformed(function: Function, inputs: Sequence[TensorBytes]) -> list[TensorBytes]:
    """A weight transform of tensors that have not been read.

    Where it moves whole rows and does nothing else, as all transforms of ``families/`` do, the
    results are ranges of the inputs' bytes in another order.  Otherwise the tensors are read.

    Args:
        function: One direction of a ``WeightTransform``: its results hold every value of its
            arguments once.
    """
    infos = [TensorInfo.of(part) for part in function([data.info.meta() for data in inputs])]
    rows = _moved_rows(function, [data.info for data in inputs], infos)
    if rows is None:
        return [TensorBytes.of(part) for part in function([data.tensor() for data in inputs])]
    joined = [part for data in inputs for part in data.parts]
    results = []
    for info, order in zip(infos, rows, strict=True):
        size = info.num_bytes // max(1, len(order))
        cuts = [_cut(joined, first * size, count * size) for first, count in _runs(order)]
        results.append(TensorBytes(info, [part for cut in cuts for part in cut]))
    return results


def _moved_rows(
    function: Function, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]
) -> list[np.ndarray] | None:
    """For each result, the numbers of its rows in the inputs, which are counted through.

    Found by applying the function to matrices with the inputs' rows and two columns of numbers.

    Returns:
        None where it does not move rows alone.
    """
    everything = [*inputs, *outputs]
    kinds = {(info.dtype, info.shape[1:], len(info.shape)) for info in everything}
    (_, columns, dims), *others = kinds
    if others or dims not in (1, 2):
        return None
    width = 2 if columns else 1
    ends = list(accumulate(info.shape[0] for info in inputs))
    numbers = torch.arange(ends[-1] * width).view(ends[-1], *[width][: dims - 1])
    parts = numbers.split([info.shape[0] for info in inputs])
    try:
        moved = [part.reshape(-1, width).numpy() for part in function(parts)]
    except (RuntimeError, IndexError):
        return None  # the number of columns matters
    if [len(part) for part in moved] != [info.shape[0] for info in outputs]:
        return None
    rows = [part[:, 0] // width for part in moved]
    are_whole = all(
        np.array_equal(part, row[:, None] * width + np.arange(width))
        for part, row in zip(moved, rows, strict=True)
    )
    is_permutation = np.array_equal(np.sort(np.concatenate(rows)), np.arange(ends[-1]))
    return rows if are_whole and is_permutation else None


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """First row and number of rows, for every run of consecutive ones."""
    if len(rows):
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            yield int(run[0]), len(run)


def _cut(parts: Sequence[Part], start: int, length: int) -> list[Part]:
    """Some of the bytes that lie one part behind the other."""
    found: list[Part] = []
    begin = 0  # of the part in the whole
    for part in parts:
        first, end = max(start, begin), min(start + length, begin + _length(part))
        if first < end:
            if isinstance(part, FileRange):
                found.append(part.part(first - begin, end - first))
            else:
                found.append(part[first - begin : end - begin])
        begin += _length(part)
    return found


def _length(part: Part) -> int:
    return part.length if isinstance(part, FileRange) else len(part)
