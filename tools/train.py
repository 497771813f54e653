"""Train one or more runs in sequence, in one process or under torchrun.

Each run has a YAML file, followed by its overrides:
``train.py stage1.yaml train.steps=100 stage2.yaml``.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from moiie_megatron.cli.launch import check_runs, exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.stages import describe_ranks
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.run import run_sequentially
from moiie_megatron.planning.parameters import count_parameters, format_parameters
from moiie_megatron.planning.plans.state_table import format_states
from moiie_megatron.training.stop import StopRequest
from moiie_megatron.utils.signals import SignalWatch

UNFINISHED = 3  # exit code of --is-done; 1 is an error, 2 an error in the arguments


def main(signals: SignalWatch | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of the first run")
    parser.add_argument(
        "more",
        nargs="*",
        metavar="key=value | config",
        help="overrides of the file before, e.g. train.steps=100; further YAML files",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration, tokenizer and template and print parameter counts and the "
        "memory of weights, gradients and optimizer, without allocating anything",
    )
    parser.add_argument(
        "--is-done",
        action="store_true",
        help=f"do not train; exit with 0 if all runs are finished, else with {UNFINISHED}",
    )
    arguments = parser.parse_intermixed_args()
    dist_env = dist_env_from(os.environ)
    stop = StopRequest()
    unfinished = False

    def task() -> None:
        configs = [
            load_config(file, overrides)
            for file, overrides in split_runs([arguments.config, *arguments.more])
        ]
        if arguments.dry_run:
            for config in configs if dist_env.rank == 0 else ():
                check_tokenizer(config)
                print(format_parameters(count_parameters(config)))
                print(format_states(config, dist_env.world_size))
                if config.parallel.pipeline > 1 and config.pipeline_layers is not None:
                    print(
                        *describe_ranks(config.pipeline_layers, config.parallel.pipeline), sep="\n"
                    )
            return
        if arguments.is_done:
            nonlocal unfinished
            unfinished = report_progress(configs)
            return
        check_runs(configs, dist_env)
        # Importing Megatron takes seconds: errors of the configuration come first.
        from moiie_megatron.training.loop import train

        stop.listen(signals)
        run_sequentially(configs, dist_env, partial(train, stop=stop), lambda: stop.reason is None)

    return exit_code(task, dist_env) or (UNFINISHED if unfinished else 0)


def check_tokenizer(config: RunConfig) -> None:
    """Read the tokenizer and try the template, where the tokenizer is on this machine.

    Raises:
        UserError: The tokenizer cannot be read, or the template does not fit it.
    """
    if Path(config.data.tokenizer).exists():
        from moiie_megatron.data.encode.templates import load_template
        from moiie_megatron.data.encode.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(config.data.tokenizer, config.data.image_token)
        load_template(config.stage.template, tokenizer)


def report_progress(configs: Sequence[RunConfig]) -> bool:
    """Print the progress of each run; return whether any is unfinished."""
    from moiie_megatron.training.resume import steps_done

    progress = [steps_done(config) for config in configs]
    for config, (done, steps) in zip(configs, progress, strict=True):
        print(f"{config.output}: step {done} of {steps}")
    return any(done < steps for done, steps in progress)


def split_runs(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each file with the overrides that follow it; a word without ``=`` is a file."""
    runs: list[tuple[str, list[str]]] = []
    for word in words:
        if runs and "=" in word:
            runs[-1][1].append(word)
        else:
            runs.append((word, []))
    return runs


if __name__ == "__main__":
    signals = SignalWatch(more=[signal.SIGUSR1])
    run_program(partial(main, signals), signals)
