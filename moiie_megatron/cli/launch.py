"""From a process that a launcher started to a finished run, with errors fit for a user.

Torch and Megatron are imported where they are needed: a mistake in the configuration is told
without waiting for them.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from moiie_megatron.cli.log import configure_logging
from moiie_megatron.cli.output import is_file_problem, report_file_problem
from moiie_megatron.config.optional_dependencies import check_extras
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config, check_paths
from moiie_megatron.mcore.dist_env import DistEnv, connect_store
from moiie_megatron.utils.errors import UserError

_FAILED = "moiie/failed"
_CONNECT_TIMEOUT = timedelta(seconds=20)


def check_run(config: RunConfig, dist_env: DistEnv) -> None:
    """Everything that can be known before the first process group exists.

    Raises:
        UserError: See ``config/validate.py`` and ``config/optional_dependencies.py``; or a set to
            evaluate cannot be used.
    """
    check_config(config, world_size=dist_env.world_size)
    check_extras(config)
    check_paths(config)
    if config.evaluation.interval and config.evaluation.process and dist_env.rank == 0:
        from moiie_megatron.evaluation.watch.sets import read_sets

        read_sets(config.evaluation)


def check_runs(configs: Sequence[RunConfig], dist_env: DistEnv) -> None:
    """``check_run`` for runs in sequence; one may start from the output of an earlier one.

    Raises:
        UserError: See ``check_run``; or two runs have the same output directory.
    """
    outputs: list[Path] = []
    for config in configs:
        source = config.checkpoint.init_from
        if source is not None and Path(source) in outputs:
            later = config.checkpoint.model_copy(update={"init_from": None})
            check_run(config.model_copy(update={"checkpoint": later}), dist_env)
        else:
            check_run(config, dist_env)
        if Path(config.output) in outputs:
            raise UserError(
                f"output is {config.output!r} in two of the runs: give each its own directory."
            )
        outputs.append(Path(config.output))


def exit_code(task: Callable[[], None], dist_env: DistEnv) -> int:
    """Run a task of this process and return its exit code.

    A ``UserError`` is printed as one sentence, every other exception with its traceback; the code
    is 1.  One process of a job prints: the first that fails, whichever rank it is.  The launcher
    ends the others; what they meet because a peer is gone would hide the cause.
    """
    configure_logging(dist_env.rank)
    try:
        task()
    except Exception as error:
        if is_file_problem(error):
            return leave(report_file_problem(error))
        if _is_first_to_fail(dist_env):
            if isinstance(error, UserError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                # In one piece: the output of other processes may go to the same place.
                print(traceback.format_exc(), end="", file=sys.stderr, flush=True)
        return leave(1)
    return 0


def _is_first_to_fail(dist_env: DistEnv) -> bool:
    if dist_env.world_size == 1:
        return True
    try:
        # Joined even before the processes are connected otherwise: an error on one node alone
        # must be told too.
        store = connect_store(dist_env, _CONNECT_TIMEOUT)
        return bool(store.add(_FAILED, 1) == 1)
    except (RuntimeError, UserError):  # nobody holds the store: better twice than never
        return True


def leave(code: int) -> int:
    """End the process, at once if it is in a process group.

    Other processes may be inside a collective, for which threads of the communication library
    would wait at a normal exit.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
