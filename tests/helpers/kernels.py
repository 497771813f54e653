"""How many kernels a function would start on a GPU, counted on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that allocate or make views.
_NO_KERNEL = (
    "_local_scalar_dense",
    "empty",
    "new_empty",
    "empty_like",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
)


class Kernels(TorchDispatchMode):
    """Counts of the operators that do more than make a view or allocate, by name.

    Attributes:
        counts: Number of kernels by operator.
        row_copies: Those of them that write a matrix of ``width`` columns.

    Args:
        width: Number of columns of the rows to watch.
    """

    def __init__(self, width: int = -1) -> None:
        super().__init__()
        self.width = width
        self.counts: Counter[str] = Counter()
        self.row_copies: Counter[str] = Counter()

    @contextmanager
    def recorded(self) -> Iterator[Kernels]:
        with self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _NO_KERNEL and not func.is_view:
            self.counts[name] += 1
            first = result[0] if isinstance(result, tuple) and result else result
            if isinstance(first, Tensor) and first.dim() == 2 and first.shape[1] == self.width:
                self.row_copies[name] += 1
        return result
