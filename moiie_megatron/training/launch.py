"""From a process that a launcher started to a finished run, with errors fit for a user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from moiie_megatron.backend.megatron import check_passthrough
from moiie_megatron.backend.parallel import Launch, World, start_world, stop_world
from moiie_megatron.config.checks import check_config, check_paths
from moiie_megatron.config.schema import RunConfig


def launch_from(environ: Mapping[str, str]) -> Launch:
    """What torchrun put into the environment; a single process without it.

    Raises:
        ValueError: A variable that is set but is no number.
    """
    values = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = environ.get(name, str(default))
        if not text.isdecimal():
            raise ValueError(f"{name} is {text!r} in the environment: start with torchrun.")
        values[name] = int(text)
    return Launch(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


def check_run(config: RunConfig, launch: Launch) -> None:
    """Everything that can be known before the first process group exists.

    Raises:
        ValueError: See ``config/checks.py``.
    """
    check_config(config, world_size=launch.world_size)
    check_passthrough(config)
    check_paths(config)


def run_in_world(config: RunConfig, launch: Launch, body: Callable[[World], None]) -> None:
    """Start the process groups, run ``body``, take them down.

    On the CPU every process uses one thread unless OMP_NUM_THREADS says otherwise (torchrun
    sets it): more processes than cores would fight for them.
    """
    world = start_world(
        config.active_parallel, launch, device=config.train.device, seed=config.train.seed
    )
    body(world)
    stop_world()


def exit_code(task: Callable[[], None], launch: Launch) -> int:
    """Run a task of this process; a user's error becomes one sentence and the code 1.

    One process of a job prints: the first that fails, or rank 0 for what all of them see before
    they are connected.  The launcher ends the others.
    """
    try:
        task()
    except ValueError as error:
        if _is_first_to_fail(launch):
            print(f"error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: other processes may be inside a collective, and threads of the
        # communication library would wait for them.
        os._exit(1) if dist.is_initialized() else None
        return 1
    return 0


def _is_first_to_fail(launch: Launch) -> bool:
    if not dist.is_initialized():
        return launch.rank == 0
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return store.add("moiie/failed", 1) == 1
    except RuntimeError:  # the process that held the store is gone: better twice than never
        return True
