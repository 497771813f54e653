"""Train: one YAML file, overrides as ``key.sub=value``; started alone or by torchrun."""

from __future__ import annotations

import argparse
import os
import sys

from moiie_megatron.config.load import load_config
from moiie_megatron.planning.parameters import count_parameters, format_parameters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration and print parameter counts; allocates nothing",
    )
    arguments = parser.parse_args()

    # Heavy imports after the arguments: --help answers at once.
    from moiie_megatron.training.launch import check_run, exit_code, launch_from, run_in_world
    from moiie_megatron.training.loop import train

    launch = launch_from(os.environ)

    def task() -> None:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(format_parameters(count_parameters(config)))
            return
        check_run(config, launch)
        run_in_world(config, launch, lambda world: train(config, world))

    return exit_code(task, launch)


if __name__ == "__main__":
    sys.exit(main())
