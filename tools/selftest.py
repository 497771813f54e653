"""Check an installation and its GPUs: versions, collectives, numbers, training, speed.

``python tools/selftest.py`` on one GPU, ``torchrun --nproc-per-node 8 tools/selftest.py`` on
eight, ``--device cpu`` without one.  Each check ends with PASS, FAIL or SKIP and a reason; the exit
code is 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moiie_megatron.cli.launch import exit_code, leave
from moiie_megatron.cli.program import run_program
from moiie_megatron.mcore.dist_env import dist_env_from


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("--list", action="store_true", help="list the checks and exit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write a report here")
    parser.add_argument(
        "--directory",
        type=Path,
        help="for temporary files; on several nodes one that all of them see",
    )
    arguments = parser.parse_args()
    dist_env = dist_env_from(os.environ)
    codes: list[int] = []

    def task() -> None:
        # Importing Megatron takes seconds: mistakes in the arguments come first.
        from moiie_megatron.selftest.main import list_checks, run_selftest

        if arguments.list:
            if dist_env.rank == 0:
                print(list_checks())
            codes.append(0)
            return
        codes.append(
            run_selftest(
                dist_env,
                device=arguments.device,
                only=arguments.only,
                quick=arguments.quick,
                json_file=arguments.json,
                directory=arguments.directory,
            )
        )

    # A process group in which something went wrong would wait at a normal exit.
    return leave(exit_code(task, dist_env) or codes[0])


if __name__ == "__main__":
    run_program(main)
