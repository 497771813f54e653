"""Write a self-contained HTML report about one run, or about runs that continue each other.

It shows configuration, curves, routing, answers, data problems and checkpoints, all read from the
output directories; no model is loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.mcore.dist_env import DistEnv


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output directories, in the order of training"
    )
    parser.add_argument(
        "--scores",
        metavar="FILE",
        help="file of tools/accuracy.py --out; default: scores.json in the last RUN, if it exists",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the HTML file; default: report.html in the last RUN"
    )
    arguments = parser.parse_args()

    def task() -> None:
        from moiie_megatron.analysis.report import write_report

        last = Path(arguments.runs[-1])
        scores = arguments.scores
        if scores is None and (last / "scores.json").exists():
            scores = last / "scores.json"
        print(write_report(arguments.runs, arguments.out or last / "report.html", scores=scores))

    return exit_code(task, DistEnv())


if __name__ == "__main__":
    run_program(main)
