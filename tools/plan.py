"""Plan a run before GPUs are booked: memory, communication and time of a layout, on any machine.

The run's own code is executed for single ranks of the job, on tensors without values.  Paths of
the configuration need not exist, and variables in it need not be set.  --search finds the fastest
layout that fits.  Exit code 3: the layout does not fit, or none does.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_megatron.cli.arguments import check_range
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.overrides import parse_with_overrides
from moiie_megatron.cli.plan_inputs import InputOptions, make_inputs, read_unset_config
from moiie_megatron.cli.program import run_program
from moiie_megatron.cli.progress_bar import progress_bar
from moiie_megatron.cli.simulations import Simulations, simulations
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.planning.hardware import CUSTOM, GPU_NAMES, Hardware, gpu
from moiie_megatron.planning.plans.jobs import Inputs
from moiie_megatron.planning.plans.plan import Plan, make_plan
from moiie_megatron.planning.plans.plan_report import (
    layout_text,
    plan_summary,
    plan_text,
    plan_values,
)
from moiie_megatron.planning.search.scaling import (
    grown_configs,
    plan_scaling,
    scaling_text,
    scaling_values,
)
from moiie_megatron.planning.search.search import SearchSize, search
from moiie_megatron.planning.search.search_report import search_text, search_values
from moiie_megatron.planning.search.written_config import check_absent, write_config
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import write_output

NO_FIT = 3  # exit code; 1 is an error, 2 an error in the arguments
MAX_GPUS = 1 << 20


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gpus", type=int, metavar="N", help="GPUs of the job")
    what.add_argument(
        "--scaling",
        metavar="N,N,...",
        help="plan these numbers of GPUs instead, multiples of the first one, with as many samples "
        "per GPU on each",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="GPU",
        help=f"{', '.join(GPU_NAMES)} or {CUSTOM}: GiB, dense bf16 TFLOP/s, GB/s per direction in "
        "a node and between nodes; default: h100",
    )
    parser.add_argument("--search", action="store_true", help="try other layouts, best first")
    parser.add_argument(
        "--layouts", type=int, default=10, metavar="N", help="how many --search simulates; 10"
    )
    parser.add_argument(
        "--data", metavar="FILE", help="report of prepare_data.py validate --json about the data"
    )
    parser.add_argument(
        "--images-per-sample", type=int, metavar="N", help="without --data; default: 1"
    )
    parser.add_argument(
        "--routing",
        default="balanced",
        metavar="HOW",
        help="balanced; skew=F: the most used expert of each modality has F times its balanced "
        "load; or the routing.jsonl of a run",
    )
    parser.add_argument(
        "--summary", action="store_true", help="print the verdict and the largest numbers alone"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a figure as PNG")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write a configuration with the (best) layout"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="simulations at a time, of about 1 GB each; default: 2",
    )
    return parser


@dataclass(frozen=True)
class Request:
    """The command line, read and checked."""

    arguments: argparse.Namespace
    config: RunConfig
    hardware: Hardware
    inputs: Inputs
    worlds: tuple[int, ...]


def main() -> int:
    arguments = parse_with_overrides(make_parser())
    fits = True

    def task() -> None:
        nonlocal fits
        request = read_request(arguments)
        with ExitStack() as stack:
            simulate = stack.enter_context(simulations(arguments.processes))
            simulate.progress = stack.enter_context(progress_bar("simulating", unit="records"))
            plans, text, values = answer(request, simulate)
        print(text, end="")
        fits = any(plan.verdict != "does not fit" for plan in plans)
        write_files(request, plans, values)

    return exit_code(task, DistEnv()) or (0 if fits else NO_FIT)


def read_request(arguments: argparse.Namespace) -> Request:
    """Check everything that can be checked before anything is simulated.

    Raises:
        UserError: The first problem.
    """
    for name, lowest, highest in (
        ("gpus", 1, MAX_GPUS),
        ("gpus_per_node", 1, MAX_GPUS),
        ("layouts", 1, 1000),
        ("images_per_sample", 0, MAX_GPUS),
        ("processes", 1, 1024),
    ):
        check_range(arguments, name, lowest, highest)
    worlds = (arguments.gpus,) if arguments.scaling is None else numbers(arguments.scaling)
    if arguments.scaling is not None and (arguments.search or arguments.write):
        raise UserError(
            "--scaling plans the layout of the configuration: leave out --search and --write."
        )
    if arguments.write is not None:
        check_absent(arguments.write)
    config = read_unset_config(arguments.config, arguments.overrides)
    hardware = gpu(arguments.gpu, arguments.gpus_per_node)
    options = InputOptions(arguments.data, arguments.images_per_sample, arguments.routing)
    inputs = make_inputs(config, options)
    if not arguments.search:
        for world, grown in zip(worlds, grown_configs(config, worlds), strict=True):
            typical, _ = inputs.workloads(grown, world)
            inputs.routing(grown, typical)
    else:
        check_config(config)
    return Request(arguments, config, hardware, inputs, worlds)


def numbers(text: str) -> tuple[int, ...]:
    """Numbers of GPUs with commas between them.

    Raises:
        UserError: Something else.
    """
    words = text.split(",")
    if not all(word.isdecimal() and 0 < int(word) <= MAX_GPUS for word in words):
        raise UserError(f"--scaling is {text!r}: use numbers of GPUs such as 8,64,512.")
    return tuple(map(int, words))


def answer(request: Request, simulate: Simulations) -> tuple[list[Plan], str, dict[str, Any]]:
    """The plans, best first, what to print, and the values for --json."""
    arguments, config, inputs = request.arguments, request.config, request.inputs
    if arguments.scaling is not None:
        points = plan_scaling(config, request.worlds, request.hardware, inputs, simulate)
        plans = [point.plan for point in points]
        return plans, scaling_text(points), {"scaling": scaling_values(points)}
    (world,) = request.worlds
    written = plan_summary if arguments.summary else plan_text
    if not arguments.search:
        plan = make_plan(config, world, request.hardware, inputs, simulate)
        return [plan], written(plan), plan_values(plan)
    size = SearchSize(shallow=arguments.layouts)
    result = search(config, world, request.hardware, inputs, simulate, size)
    plans = [one.plan for one in result.found]
    best = f"\n{written(plans[0])}" if plans else ""
    return plans, search_text(result) + best, search_values(result)


def write_files(request: Request, plans: Sequence[Plan], values: dict[str, Any]) -> None:
    """Write what was asked for, and say so."""
    arguments = request.arguments
    if arguments.json is not None:
        with write_output(arguments.json) as beside:
            beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        print(f"{arguments.json}: the plan")
    if arguments.picture is not None and plans:
        print(f"{draw(request, plans, arguments.picture)}: the figure")
    if arguments.write is not None and plans:
        best = plans[0]
        title = f"{best.world} x {best.hardware.name}, {layout_text(best.config)}"
        comment = f"Planned by tools/plan.py for {title}."
        write_config(arguments.write, arguments.config, arguments.overrides, best.config, comment)
        print(f"{arguments.write}: the configuration")


def draw(request: Request, plans: Sequence[Plan], out: Path) -> Path:
    from moiie_megatron.analysis.plan_figures import plot_memory, plot_scaling
    from moiie_megatron.planning.search.scaling import ScalingPoint

    if request.arguments.scaling is None:
        return plot_memory(plans[0], out)
    return plot_scaling([ScalingPoint(plan.world, plan) for plan in plans], out)


if __name__ == "__main__":
    run_program(main)
