"""Call a function inside fresh process groups, once or for several runs one after the other.

Torch and Megatron are imported when a run starts, not before.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.dist_env import DistEnv, connect_store
from moiie_megatron.utils.cpu_features import has_bf16_instructions

if TYPE_CHECKING:
    from moiie_megatron.mcore.parallel import ParallelContext

LOGGER: Final = logging.getLogger(__name__)


def run_distributed(
    config: RunConfig, dist_env: DistEnv, body: Callable[[ParallelContext], Any], store: Any = None
) -> None:
    """Set up the process groups of a run, call ``body``, destroy them.

    Args:
        config: The run; its degrees of parallelism, device and seed are used here.
        body: Called with the parallel context.
        store: Key-value store in which the processes find each other (``init_parallel``).

    Raises:
        UserError: The device lacks what the run needs (``init_parallel``, ``check_device``).
    """
    from moiie_megatron.mcore.config import transformer_config
    from moiie_megatron.mcore.determinism import set_determinism
    from moiie_megatron.mcore.device_checks import own_globals
    from moiie_megatron.mcore.parallel import destroy_parallel, init_parallel
    from moiie_megatron.mcore.process_lifetime import kill_children_on_exit

    kill_children_on_exit()
    set_determinism(config.train.deterministic)
    context = init_parallel(
        config.active_parallel,
        dist_env,
        device=config.train.device,
        transformer_impl=config.train.transformer_impl,
        seed=config.train.seed,
        timeout=timedelta(minutes=config.train.timeout_minutes),
        store=store,
    )
    transformer_config(config, context.device)  # what the machine lacks is told before body starts
    if (
        config.train.precision == "bf16"
        and not context.device.is_cuda
        and has_bf16_instructions() is False
    ):
        LOGGER.warning(
            "train.precision is bf16, but this CPU has no BF16 instructions, and may take minutes "
            "for what takes seconds in fp32: use train.precision=fp32."
        )
    with own_globals():
        body(context)
    destroy_parallel()


def run_sequentially(
    configs: Sequence[RunConfig],
    dist_env: DistEnv,
    body: Callable[[RunConfig, ParallelContext], Any],
    should_continue: Callable[[], bool] = lambda: True,
) -> None:
    """Call ``body`` for every run, each in new process groups with the run's parallel degrees.

    Args:
        configs: The runs, in order.
        body: Called with the run and its parallel context.
        should_continue: Called after each run; False skips the remaining ones.  Must return the
            same on all ranks.
    """
    import torch
    import torch.distributed as dist

    longest = max(config.train.timeout_minutes for config in configs)
    store = connect_store(dist_env, timedelta(minutes=longest))
    for number, config in enumerate(configs):
        # One store serves the whole job.  Without a prefix per run the processes would find the
        # addresses of the run before.
        keys = dist.PrefixStore(f"run{number}", store)
        run_distributed(config, dist_env, partial(body, config), keys)
        gc.collect()  # model and optimizer form reference cycles; the next run needs their memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not should_continue():
            return
