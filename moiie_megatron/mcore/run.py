"""Runs in process groups of their own, one after the other.

Torch and Megatron are imported when a run starts, not before.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.dist_env import DistEnv, connect_store

if TYPE_CHECKING:
    from moiie_megatron.mcore.parallel import ParallelContext


def run_distributed(
    config: RunConfig, dist_env: DistEnv, body: Callable[[ParallelContext], Any], store: Any = None
) -> None:
    """Start the process groups, run ``body``, take them down.

    On the CPU every process uses one thread unless OMP_NUM_THREADS says otherwise (torchrun
    sets it): more processes than cores would fight for them.

    Args:
        store: Where the processes find each other (``init_parallel``).
    """
    from moiie_megatron.mcore.determinism import set_determinism
    from moiie_megatron.mcore.parallel import destroy_parallel, init_parallel
    from moiie_megatron.mcore.process_lifetime import kill_children_on_exit

    kill_children_on_exit()
    set_determinism(config.train.deterministic)
    context = init_parallel(
        config.active_parallel,
        dist_env,
        device=config.train.device,
        seed=config.train.seed,
        store=store,
    )
    body(context)
    destroy_parallel()


def run_sequentially(
    configs: Sequence[RunConfig],
    dist_env: DistEnv,
    body: Callable[[RunConfig, ParallelContext], Any],
    should_continue: Callable[[], bool] = lambda: True,
) -> None:
    """Each run in a world of its own, with its own degrees of parallelism.

    The launcher offers one store for the whole job; every world has its own keys in it, or its
    processes would find the addresses of the world before.

    Args:
        go_on: Asked after each run whether the next one shall begin, alike on all ranks.
    """
    import torch
    import torch.distributed as dist

    store = connect_store(dist_env)
    for number, config in enumerate(configs):
        keys = dist.PrefixStore(f"run{number}", store)
        run_distributed(config, dist_env, partial(body, config), keys)
        gc.collect()  # model and optimizer refer to each other; the next run needs their memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not should_continue():
            return
