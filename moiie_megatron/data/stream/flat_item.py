"""Items of a stream on their way from a worker process: all tensors of one in one buffer.

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
    file = io.BytesIO()
    pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dump(item)
    layout = tuple((tensor.dtype, tensor.shape) for tensor in pickler.tensors)
    buffer = torch.empty(_offsets(layout)[-1], dtype=torch.uint8).share_memory_()
    for view, tensor in zip(_views(buffer, layout), pickler.tensors, strict=True):
        view.copy_(tensor)
    return FlatItem(file.getvalue(), layout, buffer)


def _offsets(layout: Sequence[tuple[torch.dtype, torch.Size]]) -> list[int]:
    """Where every tensor begins in the buffer, and where the last one ends."""
    sizes = (-(-shape.numel() * dtype.itemsize // _ALIGNMENT) for dtype, shape in layout)
    return [_ALIGNMENT * blocks for blocks in accumulate(sizes, initial=0)]


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
