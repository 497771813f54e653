"""What a checkpoint saves of a stream besides the number of samples consumed.

Energon's stream has such a state; the plain loader has none.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class SavableStream(Protocol):
    """A stream that can continue where it was saved."""

    def state_bytes(self) -> bytes:
        """The state after the item that was yielded last."""


class StreamState:
    """The state of a stream: one tensor of bytes per data-parallel rank in a checkpoint.

    Attributes:
        restored: The state that the checkpoint held, from which a new stream continues.
    """

    def __init__(self) -> None:
        self.restored: bytes | None = None
        self._stream: SavableStream | None = None

    def attach(self, stream: SavableStream) -> None:
        """Save the state of ``stream`` from now on."""
        self._stream = stream

    def tensor(self) -> Tensor:
        """uint8 (number of bytes,): the present state; empty if there is none."""
        content = self.restored if self._stream is None else self._stream.state_bytes()
        return torch.from_numpy(np.frombuffer(content or b"", dtype=np.uint8).copy())

    def restore(self, tensor: Tensor) -> None:
        """Take over a state that ``tensor()`` returned."""
        self.restored = tensor.cpu().numpy().tobytes()
