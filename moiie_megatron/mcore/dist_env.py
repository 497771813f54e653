"""The environment variables of torchrun, and the store in which processes find each other.

Torch is imported only when the store is opened.
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


# The number of processes that srun and mpirun have started.
_OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class DistEnv:
    """Rank of this process and size of the job; the default is a single process.

    Attributes:
        rank: ``RANK``.
        world_size: ``WORLD_SIZE``.
        local_rank: ``LOCAL_RANK``, the rank on its node.
        attempt: How often torchrun has restarted the job; 0 where every attempt has its own store.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    attempt: int = 0


def dist_env_from(environ: Mapping[str, str]) -> DistEnv:
    """Read the variables that torchrun sets; without them, a single process.

    Raises:
        UserError: A variable is set to something other than a number, or is missing beside
            others; or another launcher has started several processes.
    """
    _check_launcher(environ)
    values = {}
    restarts = "TORCHELASTIC_RESTART_COUNT"
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), (restarts, 0)):
        text = environ.get(name, str(default))
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r} in the environment: start with torchrun.")
        values[name] = int(text)
    rank, size = values["RANK"], values["WORLD_SIZE"]
    if rank >= size:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE is {size} in the environment: start with torchrun."
        )
    # Without a common store the agents may have counted restarts differently.
    keeps_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = values[restarts] if keeps_store else 0
    return DistEnv(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], attempt)


def _check_launcher(environ: Mapping[str, str]) -> None:
    """Refuse a part of torchrun's variables, and none of them where there are several processes.

    Raises:
        UserError: One of these.
    """
    has_rank = "RANK" in environ
    if has_rank != ("WORLD_SIZE" in environ) and environ.get("WORLD_SIZE") != "1":
        there, missing = ("RANK", "WORLD_SIZE") if has_rank else ("WORLD_SIZE", "RANK")
        raise UserError(
            f"{there} is {environ[there]!r} in the environment, but {missing} is not set: start "
            f"with torchrun, or unset {there} for a single process."
        )
    for name in () if has_rank else _OTHER_LAUNCHERS:
        if environ.get(name, "1") not in ("", "1"):
            raise UserError(
                f"{name} is {environ[name]} in the environment, but RANK is not set: every "
                "process would be a run of its own, start torchrun once on each node "
                "(examples/slurm), or set RANK=0 and WORLD_SIZE=1 for a single process."
            )


def connect_store(dist_env: DistEnv, timeout: timedelta = timedelta(minutes=10)) -> Store:
    """Open the key-value store at MASTER_ADDR:MASTER_PORT, which the launcher or rank 0 serves.

    A single process gets a store in memory.

    Raises:
        UserError: MASTER_ADDR or MASTER_PORT is not set or of no use, or not all processes have
            met there within ``timeout``.
    """
    import torch.distributed as dist

    if dist_env.world_size == 1:
        return dist.HashStore()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name} is not set in the environment: start with torchrun.")
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"MASTER_PORT is {port!r} in the environment, which is no port: start with torchrun."
        )
    found = dist.rendezvous("env://", dist_env.rank, dist_env.world_size, timeout=timeout)
    try:
        store: Store = next(found)[0]
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"The {dist_env.world_size} processes (WORLD_SIZE) have not met at {address}:{port} "
            f"(MASTER_ADDR, MASTER_PORT; {reason}): start all of them, with torchrun."
        ) from error
    store.set_timeout(timeout)
    # A store that outlives a restart still holds the addresses of the processes before it.
    return dist.PrefixStore(f"attempt{dist_env.attempt}", store)
