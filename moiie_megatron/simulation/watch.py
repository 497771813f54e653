"""Watch a step, simulated or real: kernels, memory and collectives of one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from operator import add
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.planning.trace import Compute, MemoryTrace, Part, Pass, Transfer
from moiie_megatron.simulation.flops import count_flops
from moiie_megatron.simulation.memory import MemoryTracker
from moiie_megatron.simulation.parts import PartTracker
from moiie_megatron.simulation.transfers import TransferRecorder
from moiie_megatron.vlm.chunks import ModelChunks

aten = torch.ops.aten


class Watch(TorchDispatchMode):
    """While it is entered, watches every operation of this process.

    Args:
        chunks: The model of this rank.
        groups: Megatron's process groups by name.

    Attributes:
        parts: Tells what is running.
        memory: Live tensors.
        expert_rows: See ``RankTrace``.
    """

    def __init__(self, chunks: ModelChunks, groups: dict[str, Any]) -> None:
        super().__init__()
        self.parts = PartTracker(chunks)
        self.memory = MemoryTracker()
        self._transfers = TransferRecorder(groups, self.parts)
        self._counts: Counter[tuple[Part, Pass, str]] = Counter()
        self.expert_rows: dict[int, tuple[int, ...]] = {}
        self._experts = {
            layer.layer_number - 1: layer.mlp.experts
            for chunk in chunks
            for layer in chunk.language_model.decoder.layers
            if isinstance(layer.mlp, MoIIELayer)
        }
        self._last: tuple[Part, Pass] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        self._stack.enter_context(self.parts)
        self._stack.enter_context(self._transfers)
        for number, experts in self._experts.items():
            hook = experts.register_forward_pre_hook(partial(self._count_rows, number))
            self._stack.callback(hook.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default or func.is_view:
            return func(*args, **kwargs)
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
        if func.namespace == "aten":
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

    def _count_rows(self, layer: int, experts: torch.nn.Module, args: Any) -> None:
        if self.parts.now()[1] == "forward":
            rows = args[1].tolist()
            before = self.expert_rows.get(layer, (0,) * len(rows))
            self.expert_rows[layer] = tuple(map(add, before, rows))

    def compute(self) -> tuple[Compute, ...]:
        counts = self._counts
        return tuple(
            Compute(
                part,
                when,
                flops=counts[part, when, "flops"],
                bytes=counts[part, when, "bytes"],
                matmul_bytes=counts[part, when, "matmul_bytes"],
                kernels=counts[part, when, "kernels"],
            )
            for part, when in dict.fromkeys((part, when) for part, when, _ in counts)
        )

    def transfers(self) -> tuple[Transfer, ...]:
        return self._transfers.result()

    def memory_trace(self, weights: int, gradients: int, optimizer: int) -> MemoryTrace:
        """With the bytes of what was there before the step."""
        return MemoryTrace(weights, gradients, optimizer, self.memory.peak, self.memory.timeline())


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
