"""What a launcher tells a process, and how the processes of a job find each other.

Torch is imported only to find the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True)
class Launch:
    """The place of this process among the others of the job.

    Attributes:
        attempt: How often torchrun has started the processes anew, if it keeps one store.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    attempt: int = 0


def find_store(launch: Launch, timeout: timedelta = timedelta(minutes=10)) -> Store:
    """The key-value store that the launcher offers, or rank 0 opens, at MASTER_ADDR:MASTER_PORT.

    A single process needs no launcher: it gets a store in memory.

    Raises:
        RuntimeError: Nobody answered within ``timeout``.
        ValueError: The launcher named no address.
    """
    import torch.distributed as dist

    if launch.world_size == 1:
        return dist.HashStore()
    found = dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout)
    store: Store = next(found)[0]
    store.set_timeout(timeout)
    # In a store that outlives a restart, processes would find the addresses of dead ones.
    return dist.PrefixStore(f"attempt{launch.attempt}", store)
