"""What a launcher tells a process, and how the processes of a job find each other.

Torch is imported only to find the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True)
class DistEnv:
    """The place of this process among the others of the job.

    Attributes:
        attempt: How often torchrun has started the processes anew, if it keeps one store.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    attempt: int = 0


def dist_env_from(environ: Mapping[str, str]) -> DistEnv:
    """What torchrun put into the environment; a single process without it.

    Raises:
        UserError: A variable that is set but is no number.
    """
    values = {}
    restarts = "TORCHELASTIC_RESTART_COUNT"
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), (restarts, 0)):
        text = environ.get(name, str(default))
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r} in the environment: start with torchrun.")
        values[name] = int(text)
    # Where torchrun opens a new store for every attempt, its agents may have counted differently.
    keeps_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = values[restarts] if keeps_store else 0
    return DistEnv(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], attempt)


def connect_store(dist_env: DistEnv, timeout: timedelta = timedelta(minutes=10)) -> Store:
    """The key-value store that the launcher offers, or rank 0 opens, at MASTER_ADDR:MASTER_PORT.

    A single process needs no launcher: it gets a store in memory.

    Raises:
        RuntimeError: Nobody answered within ``timeout``.
        UserError: The launcher named no address.
    """
    import torch.distributed as dist

    if dist_env.world_size == 1:
        return dist.HashStore()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name} is not set in the environment: start with torchrun.")
    found = dist.rendezvous("env://", dist_env.rank, dist_env.world_size, timeout=timeout)
    store: Store = next(found)[0]
    store.set_timeout(timeout)
    # In a store that outlives a restart, processes would find the addresses of dead ones.
    return dist.PrefixStore(f"attempt{dist_env.attempt}", store)
