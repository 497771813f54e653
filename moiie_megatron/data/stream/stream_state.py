"""What a stream must save beside the number of samples consumed: nothing for the plain loader."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class StreamState:
    """Stands in a checkpoint as one tensor of bytes per data-parallel rank.

    Attributes:
        restored: What an earlier run has saved.
        source: Gives what is to be saved now; set by a stream that has something.
    """

    def __init__(self) -> None:
        self.restored: bytes | None = None
        self.source: Callable[[], bytes] | None = None

    def tensor(self) -> Tensor:
        """uint8 [n]: the state as it is now."""
        content = self.source() if self.source is not None else self.restored
        return torch.from_numpy(np.frombuffer(content or b"", dtype=np.uint8).copy())

    def restore(self, tensor: Tensor) -> None:
        """Take over what ``tensor`` gave."""
        self.restored = tensor.cpu().numpy().tobytes()
