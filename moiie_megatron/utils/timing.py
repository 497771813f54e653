"""Times callables against each other in one process: interleaved runs, medians of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timings:
    """Seconds per run, by name; run i of every name happened in the same round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one callable."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, peer: str) -> float:
        """Median over rounds of this one's time divided by the peer's in the same round."""
        pairs = zip(self.seconds[name], self.seconds[peer], strict=True)
        return statistics.median(mine / its for mine, its in pairs)

    def fastest(self, names: list[str]) -> str:
        """The name with the smallest median."""
        return min(names, key=self.median)


def slower_rank(timings: Timings, device: torch.device = _CPU) -> Timings:
    """Every run as long as its slowest rank.

    Args:
        device: Where collectives take their tensors from.
    """
    times = torch.tensor([timings.seconds[name] for name in timings.seconds], device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return Timings(dict(zip(timings.seconds, times.tolist(), strict=True)))


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    device: torch.device = _CPU,
) -> Timings:
    """Run every callable once per round; the order rotates so that none always comes first.

    Args:
        device: Where the work is done; a run is over when a GPU has done it.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            _wait_for(device)
            start = time.perf_counter()
            runs[name]()
            _wait_for(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return Timings(seconds)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
