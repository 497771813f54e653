"""Items of a stream on their way to another process: all tensors of one in one buffer.

PyTorch hands every tensor over in a shared memory of its own, whose file descriptor is open in both
processes for as long as the tensor lives.  A step of hundreds of micro-batches with six tensors
each would need more than the 1024 that a process usually may have.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

_ALIGNMENT: Final = 64  # bytes; tensors of every type may begin there
_LENGTH: Final = torch.int64  # type of the length of the header of ``to_bytes``


@dataclass(frozen=True)
class FlatItem:
    """An item whose tensors are in one buffer.

    Attributes:
        content: The pickled item, with numbers in place of its tensors.
        layout: Type and shape of every tensor.
        buffer: uint8 (bytes of all tensors,), in shared memory or pinned.
    """

    content: bytes
    layout: tuple[tuple[torch.dtype, torch.Size], ...]
    buffer: Tensor

    def pin_memory(self) -> FlatItem:
        """The item in pinned memory; torch's DataLoader calls this method by its name."""
        return replace(self, buffer=self.buffer.pin_memory())

    def restore(self) -> Any:
        """The item; its tensors share one buffer, which is no longer in shared memory."""
        buffer = self.buffer.clone() if self.buffer.is_shared() else self.buffer
        return _Unpickler(self.content, _views(buffer, self.layout)).load()


def flatten(item: Any) -> FlatItem:
    """The item for another process.

    Shared memory is allocated here and not, as PyTorch does it, by the thread that sends the item:
    an error there would lose the item, and the receiver would wait for ever.

    Args:
        item: Any object that can be pickled; its tensors are on the CPU.

    Raises:
        RuntimeError: There is not enough shared memory.
    """
    content, tensors = _pickled(item)
    layout = _layout(tensors)
    buffer = torch.empty(_offsets(layout)[-1], dtype=torch.uint8).share_memory_()
    _fill(buffer, layout, tensors)
    return FlatItem(content, layout, buffer)


def to_bytes(item: Any) -> Tensor:
    """The item as uint8 (bytes,), for another process of the job; ``from_bytes`` reads it.

    Args:
        item: Any object that can be pickled; its tensors are on the CPU.
    """
    content, tensors = _pickled(item)
    layout = _layout(tensors)
    header = pickle.dumps((content, layout), pickle.HIGHEST_PROTOCOL)
    start = _aligned(_LENGTH.itemsize + len(header))
    result = torch.zeros(start + _offsets(layout)[-1], dtype=torch.uint8)
    result[: _LENGTH.itemsize].view(_LENGTH)[0] = len(header)
    result[_LENGTH.itemsize : start][: len(header)] = torch.frombuffer(
        bytearray(header), dtype=torch.uint8
    )
    _fill(result[start:], layout, tensors)
    return result


def from_bytes(buffer: Tensor) -> Any:
    """The item; its tensors share ``buffer``.

    Args:
        buffer: uint8 (bytes,) on the CPU, from ``to_bytes``; may be a part of a larger tensor that
            begins where another result of ``to_bytes`` ends.
    """
    length = int(buffer[: _LENGTH.itemsize].view(_LENGTH))
    header = buffer[_LENGTH.itemsize :][:length].numpy().tobytes()
    content, layout = pickle.loads(header)
    tensors = _views(buffer[_aligned(_LENGTH.itemsize + length) :], layout)
    return _Unpickler(content, tensors).load()


def _pickled(item: Any) -> tuple[bytes, list[Tensor]]:
    """The item without its tensors, and its tensors."""
    file = io.BytesIO()
    pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dump(item)
    return file.getvalue(), pickler.tensors


def _layout(tensors: Sequence[Tensor]) -> tuple[tuple[torch.dtype, torch.Size], ...]:
    return tuple((tensor.dtype, tensor.shape) for tensor in tensors)


def _fill(
    buffer: Tensor, layout: Sequence[tuple[torch.dtype, torch.Size]], tensors: Sequence[Tensor]
) -> None:
    for view, tensor in zip(_views(buffer, layout), tensors, strict=True):
        view.copy_(tensor)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _offsets(layout: Sequence[tuple[torch.dtype, torch.Size]]) -> list[int]:
    """Where every tensor begins in the buffer, and where the last one ends."""
    sizes = (_aligned(shape.numel() * dtype.itemsize) for dtype, shape in layout)
    return list(accumulate(sizes, initial=0))


def _views(buffer: Tensor, layout: Sequence[tuple[torch.dtype, torch.Size]]) -> list[Tensor]:
    return [
        buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for start, (dtype, shape) in zip(_offsets(layout), layout, strict=False)
    ]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        return self._tensors[pid]
