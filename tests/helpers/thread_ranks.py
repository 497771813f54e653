"""Data-parallel ranks as threads of one process, with the collectives that packing needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass
class _Meeting:
    """Where the ranks hand over what each brings."""

    size: int
    brought: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)

    def share(self, rank: int, value: Any) -> list[Any]:
        self.brought[rank] = value
        self.barrier.wait()
        values = [self.brought[other] for other in range(self.size)]
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRank:
    """One of the ranks.

    Attributes:
        dp_rank: Its number.
        sent: Bytes that it has sent to others, one entry per exchange.
    """

    dp_rank: int
    meeting: _Meeting
    sent: list[int] = field(default_factory=list)

    @property
    def dp_size(self) -> int:
        return self.meeting.size

    def gather_over_dp(self, numbers: Tensor) -> Tensor:
        return torch.stack(self.meeting.share(self.dp_rank, numbers))

    def exchange_over_dp(self, parts: Sequence[Tensor]) -> list[Tensor]:
        self.sent.append(sum(map(len, parts)))
        return [sent[self.dp_rank].clone() for sent in self.meeting.share(self.dp_rank, parts)]


def on_ranks(size: int, body: Callable[[ThreadRank], _T]) -> list[_T]:
    """What every rank returns; the ranks run at the same time."""
    meeting = _Meeting(size)

    def run(rank: int) -> _T:
        try:
            return body(ThreadRank(rank, meeting))
        except BaseException:
            meeting.barrier.abort()  # the others do not wait for it
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
