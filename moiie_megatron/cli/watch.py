"""Evaluate the checkpoints of a run as they come, until it has finished.

A run with ``evaluation.interval`` starts this beside itself; ``tools/evaluate.py --watch RUN`` is
the same on any machine that sees the output directory.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.overrides import parse_with_overrides
from moiie_megatron.cli.program import run_program
from moiie_megatron.cli.progress_bar import progress_bar
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_evaluation_paths
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.utils.errors import UserError

_NICE = 19  # the least
_OOM_SCORE = "1000"  # the first


def watch_run(run: str | Path, overrides: Sequence[str] = (), *, wait: bool = True) -> None:
    """Evaluate the checkpoints of a run as its ``evaluation`` section says.

    Args:
        run: Its output directory.
        overrides: ``evaluation.key=value`` each, for this call.
        wait: For further checkpoints, until the run has finished.

    Raises:
        UserError: There is no run, nothing to evaluate, a set or task cannot be used, another
            process evaluates the run, or a checkpoint could not be evaluated.
    """
    config = read_config(Path(run), overrides)
    from transformers.utils import logging

    from moiie_megatron.evaluation.watch.watcher import Watcher

    logging.disable_progress_bar()  # there is one for the questions
    watcher = Watcher(Path(run), config, progress_bar)
    watcher.run(wait=wait)
    if watcher.failures:
        raise UserError(
            f"{watcher.failures} evaluations could not be done, see above: mend the cause and give "
            "the same command, which does what is missing."
        )


def read_config(run: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run with other values for its evaluation.

    Raises:
        UserError: See ``watch_run``.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"{run} is not the output directory of a run (it has no config.yaml): name one, or "
            "wait until the run has begun."
        )
    for word in overrides:
        if not word.startswith("evaluation."):
            raise UserError(f"{word} is no override of the evaluation: use evaluation.KEY=VALUE.")
    config = load_saved_config(file, overrides)
    if not config.evaluation.interval:
        raise UserError(
            f"{file} has evaluation.interval 0: add evaluation.interval=N (a multiple of "
            f"checkpoint.interval, {config.checkpoint.interval}) and evaluation.sets=[...]."
        )
    check_evaluation_paths(config)
    return config


def step_aside() -> None:
    """Leave the CPU and the memory to everybody else."""
    with suppress(OSError):
        os.nice(_NICE)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def main() -> int:
    """The program that a run starts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="output directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="evaluation.key=value")
    parser.add_argument(
        "--no-wait", action="store_true", help="only the checkpoints that are there now"
    )
    parser.add_argument(
        "--low-priority", action="store_true", help="leave CPU and memory to everybody else"
    )
    arguments = parse_with_overrides(parser)
    if arguments.low_priority:
        step_aside()
    return exit_code(
        lambda: watch_run(arguments.run, arguments.overrides, wait=not arguments.no_wait),
        DistEnv(),
    )


if __name__ == "__main__":
    run_program(main)
