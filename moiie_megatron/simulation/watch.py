"""Watch a step, simulated or real: kernels, memory and collectives of one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moiie_megatron.planning.trace import Compute, MemoryTrace, Part, Pass, Transfer
from moiie_megatron.simulation.flops import count_flops
from moiie_megatron.simulation.memory import MemoryTracker
from moiie_megatron.simulation.parts import PartTracker
from moiie_megatron.simulation.transfers import TransferRecorder
from moiie_megatron.vlm.model import MoIIEModel

aten = torch.ops.aten


class Watch(TorchDispatchMode):
    """While it is entered, watches every operation of this process.

    Args:
        chunks: The model of this rank.
        groups: Megatron's process groups by name.

    Attributes:
        parts: Tells what is running.
        memory: Live tensors.
    """

    def __init__(self, chunks: Iterable[MoIIEModel], groups: dict[str, Any]) -> None:
        super().__init__()
        self.parts = PartTracker(chunks)
        self.memory = MemoryTracker()
        self._transfers = TransferRecorder(groups, self.parts)
        self._counts: Counter[tuple[Part, Pass, str]] = Counter()
        self._last: tuple[Part, Pass] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        self._stack.enter_context(self.parts)
        self._stack.enter_context(self._transfers)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        part, when = self.parts.now()
        inputs = list(_tensors((*args, *kwargs.values())))
        self.memory.before(inputs)
        out = func(*args, **kwargs)
        outputs = list(_tensors((out,)))
        micro_batch = self.parts.micro_batch(when)
        self.memory.after(outputs, part, when, micro_batch)
        if (part, when) != self._last:
            self.memory.sample(when, micro_batch)
            self._last = part, when
        if func.namespace == "aten" and not func.is_view:
            self._count(func, args, kwargs, out, sum(map(_nbytes, (*inputs, *outputs))))
        return out

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any, size: int) -> None:
        part, when = self._last or self.parts.now()
        flops = count_flops(func, args, kwargs, out)
        counts = self._counts
        counts[part, when, "kernels"] += 1
        counts[part, when, "bytes"] += size
        if flops:
            counts[part, when, "flops"] += flops
            counts[part, when, "matmul_bytes"] += size

    def compute(self) -> tuple[Compute, ...]:
        keys = dict.fromkeys((part, when) for part, when, _ in self._counts)
        names = ("flops", "bytes", "matmul_bytes", "kernels")
        return tuple(
            Compute(*key, **{name: self._counts[(*key, name)] for name in names}) for key in keys
        )

    def transfers(self) -> tuple[Transfer, ...]:
        return self._transfers.result()

    def memory_trace(self, weights: int, gradients: int, optimizer: int) -> MemoryTrace:
        """With the bytes of what was there before the step."""
        return MemoryTrace(
            weights, gradients, optimizer, self.memory.peak, self.memory.timeline()
        )


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
