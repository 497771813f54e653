"""From a process that a launcher started to a finished run, with errors fit for a user.

Torch and Megatron are imported where they are needed: a mistake in the configuration is told
without waiting for them.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_megatron.backend.process import Launch, find_store
from moiie_megatron.config.checks import check_config, check_paths
from moiie_megatron.config.extras import check_extras
from moiie_megatron.config.schema import RunConfig

if TYPE_CHECKING:
    from moiie_megatron.backend.parallel import World

_FAILED = "moiie/failed"
_CONNECT_TIMEOUT = timedelta(seconds=20)


def launch_from(environ: Mapping[str, str]) -> Launch:
    """What torchrun put into the environment; a single process without it.

    Raises:
        ValueError: A variable that is set but is no number.
    """
    values = {}
    restarts = "TORCHELASTIC_RESTART_COUNT"
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), (restarts, 0)):
        text = environ.get(name, str(default))
        if not text.isdecimal():
            raise ValueError(f"{name} is {text!r} in the environment: start with torchrun.")
        values[name] = int(text)
    # Where torchrun opens a new store for every attempt, its agents may have counted differently.
    keeps_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = values[restarts] if keeps_store else 0
    return Launch(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], attempt)


def check_run(config: RunConfig, launch: Launch) -> None:
    """Everything that can be known before the first process group exists.

    Raises:
        ValueError: See ``config/checks.py`` and ``config/extras.py``.
    """
    check_config(config, world_size=launch.world_size)
    check_extras(config)
    check_paths(config)
    from moiie_megatron.backend.megatron import passthrough_fields

    passthrough_fields(config)


def check_runs(configs: Sequence[RunConfig], launch: Launch) -> None:
    """``check_run`` for runs that follow each other; one may start from what an earlier one is
    still going to write.

    Raises:
        ValueError: See ``check_run``; or two runs write to one folder.
    """
    outputs: list[Path] = []
    for config in configs:
        source = config.checkpoint.init_from
        if source is not None and Path(source) in outputs:
            later = config.checkpoint.model_copy(update={"init_from": None})
            check_run(config.model_copy(update={"checkpoint": later}), launch)
        else:
            check_run(config, launch)
        if Path(config.output) in outputs:
            raise ValueError(
                f"output is {config.output!r} in two of the runs: give each its own folder."
            )
        outputs.append(Path(config.output))


def run_in_world(
    config: RunConfig, launch: Launch, body: Callable[[World], Any], store: Any = None
) -> None:
    """Start the process groups, run ``body``, take them down.

    On the CPU every process uses one thread unless OMP_NUM_THREADS says otherwise (torchrun
    sets it): more processes than cores would fight for them.

    Args:
        store: Where the processes find each other (``start_world``).
    """
    from moiie_megatron.backend.children import no_process_is_left_behind
    from moiie_megatron.backend.determinism import set_determinism
    from moiie_megatron.backend.parallel import start_world, stop_world

    no_process_is_left_behind()
    set_determinism(config.train.deterministic)
    world = start_world(
        config.active_parallel,
        launch,
        device=config.train.device,
        seed=config.train.seed,
        store=store,
    )
    body(world)
    stop_world()


def run_in_turn(
    configs: Sequence[RunConfig],
    launch: Launch,
    body: Callable[[RunConfig, World], Any],
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Each run in a world of its own, with its own degrees of parallelism.

    The launcher offers one store for the whole job; every world has its own keys in it, or its
    processes would find the addresses of the world before.

    Args:
        go_on: Asked after each run whether the next one shall begin, alike on all ranks.
    """
    import torch
    import torch.distributed as dist

    store = find_store(launch)
    for number, config in enumerate(configs):
        keys = dist.PrefixStore(f"run{number}", store)
        run_in_world(config, launch, partial(body, config), keys)
        gc.collect()  # model and optimizer refer to each other; the next run needs their memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if not go_on():
            return


def exit_code(task: Callable[[], None], launch: Launch) -> int:
    """Run a task of this process; a user's error becomes one sentence and the code 1.

    One process of a job prints: the first that fails, whichever rank it is.  The launcher ends
    the others; what they meet because a peer is gone is not worth a traceback.
    """
    try:
        task()
    except ValueError as error:
        if _is_first_to_fail(launch):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return _leave(1)
    except Exception:
        if _peer_has_failed(launch):
            return _leave(1)
        raise
    return 0


def _is_first_to_fail(launch: Launch) -> bool:
    if launch.world_size == 1:
        return True
    try:
        return bool(_job_store(launch).add(_FAILED, 1) == 1)
    except (RuntimeError, ValueError):  # nobody holds the store: better twice than never
        return True


def _peer_has_failed(launch: Launch) -> bool:
    if launch.world_size == 1:
        return False
    try:
        return bool(_job_store(launch).check([_FAILED]))
    except (RuntimeError, ValueError):
        return False


def _job_store(launch: Launch) -> Any:
    """The key-value store that connects the processes of the job, joined even before they are
    connected otherwise: an error on one node alone must be told too.

    Raises:
        RuntimeError: Nobody holds the store (any more).
        ValueError: The launcher named none.
    """
    return find_store(launch, _CONNECT_TIMEOUT)


def _leave(code: int) -> int:
    """End the process at once if it is connected: other processes may be inside a collective,
    and threads of the communication library would wait for them at a normal exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
