"""Bytes of live tensors, by the part that made them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import torch

from moiie_megatron.planning.trace import MemorySample, Part, Pass

SAMPLES: Final = 400  # of a timeline


class MemoryTracker:
    """Counts storages that operations make, while they live.

    Fake tensors have storages too, without memory behind them.  What is there when the tracker
    starts does not count.
    """

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}  # weak references by the address of the storage
        self._live: Counter[Part] = Counter()
        self._total = 0
        self._timeline: list[MemorySample] = []
        self._highest: MemorySample | None = None  # since the last sample of the timeline
        self.peak = MemorySample("forward", 0, {})
        self._peak_total = 0

    def before(self, tensors: Iterable[torch.Tensor]) -> None:
        """What an operation reads, and does not make, is not counted as its own."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._add(storage, None, 0)

    def after(
        self, tensors: Iterable[torch.Tensor], part: Part, when: Pass, micro_batch: int
    ) -> None:
        """What an operation has returned."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                size = storage.nbytes()
                self._add(storage, part, size)
                self._live[part] += size
                self._total += size
        if self._total > self._peak_total:
            self._peak_total = self._total
            self.peak = MemorySample(when, micro_batch, dict(self._live))

    def sample(self, when: Pass, micro_batch: int) -> None:
        """Add the current moment to the timeline."""
        self._timeline.append(MemorySample(when, micro_batch, dict(+self._live)))

    def timeline(self) -> tuple[MemorySample, ...]:
        """The samples, of which groups of neighbours are represented by their largest."""
        samples = self._timeline
        size = -(-len(samples) // SAMPLES) or 1
        groups = [samples[i : i + size] for i in range(0, len(samples), size)]
        return tuple(max(group, key=lambda sample: sample.total) for group in groups)

    def _add(self, storage: Any, part: Part | None, size: int) -> None:
        address = storage._cdata

        def freed(_: Any) -> None:
            del self._known[address]
            if part is not None:
                self._live[part] -= size
                self._total -= size

        self._known[address] = weakref.ref(storage, freed)
