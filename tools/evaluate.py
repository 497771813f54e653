"""Evaluate an exported model, or one behind a server, on the paper's benchmarks with lmms-eval.

With ``--watch`` evaluate the checkpoints of a run as they come, as its ``evaluation`` section says.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from moiie_megatron.cli.arguments import check_range
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.program import run_program
from moiie_megatron.cli.progress_bar import progress_bar
from moiie_megatron.cli.watch import watch_run
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from moiie_megatron.evaluation.benchmarks.catalogue import Benchmark
    from moiie_megatron.evaluation.benchmarks.environment import EvalEnvironment, JudgeServer
    from moiie_megatron.evaluation.benchmarks.outcome import Outcome
    from moiie_megatron.evaluation.benchmarks.run import Evaluation, Progress
    from moiie_megatron.evaluation.benchmarks.target import Target


def main() -> int:
    arguments = parse_arguments()
    if arguments.list:
        list_benchmarks()
        return 0
    if arguments.watch is not None:
        words = [word for word in (arguments.model, *arguments.overrides) if word is not None]
        wait = not arguments.no_wait
        return exit_code(lambda: watch_run(arguments.watch, words, wait=wait), DistEnv())
    evaluation, benchmarks = prepare(arguments, os.environ)
    return evaluate(evaluation, benchmarks)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", nargs="?", metavar="EXPORT|URL", help="exported directory, or http://HOST:PORT/v1"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="evaluation.key=value", help="with --watch: other settings"
    )
    parser.add_argument("--out", metavar="DIR", help="results; the same command goes on from them")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--suite", choices=["paper"], help="all benchmarks of the paper (default)")
    what.add_argument("--tasks", metavar="NAME,...", help="benchmarks, or tasks of lmms-eval")
    what.add_argument("--list", action="store_true", help="print the benchmarks and end")
    what.add_argument("--watch", metavar="RUN", help="output directory of a run")
    parser.add_argument(
        "--no-wait", action="store_true", help="with --watch: only the checkpoints there are now"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="prompts together (8); at a server, requests at a time (16)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer, if a task allows more"
    )
    parser.add_argument("--data", metavar="DIR", help="holds data sets: DIR/lmms-lab-encoder/POPE")
    parser.add_argument("--include", metavar="DIR", help="further tasks of lmms-eval (YAML files)")
    parser.add_argument("--python", metavar="FILE", help="Python of lmms-eval's environment")
    judge = parser.add_argument_group(
        "judge", "a language model that scores answers (key: $JUDGE_API_KEY or $OPENAI_API_KEY)"
    )
    judge.add_argument("--judge-url", metavar="URL", help="http://HOST:PORT/v1")
    judge.add_argument("--judge-model", metavar="NAME", help="its name there")
    export = parser.add_argument_group("exports")
    export.add_argument("--device", default="auto", help="auto (default), cpu, cuda ...")
    export.add_argument("--dtype", default="auto", help="auto (default: of the files), float32 ...")
    export.add_argument("--expert", metavar="NAME", help="this expert alone, as shared.0")
    export.add_argument(
        "--routing",
        action="store_true",
        help="count and draw which experts tokens take, into the directory of each benchmark",
    )
    server = parser.add_argument_group("servers", "(key: $OPENAI_API_KEY)")
    server.add_argument("--model", dest="served", metavar="NAME", help="its name at the server")
    server.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help="(600)")
    server.add_argument("--retries", type=int, default=3, metavar="N", help="attempts (3)")
    arguments = parser.parse_intermixed_args()
    if arguments.overrides and arguments.watch is None:
        parser.error(f"unrecognized arguments: {' '.join(arguments.overrides)}")
    return arguments


def prepare(
    arguments: argparse.Namespace, variables: Mapping[str, str]
) -> tuple[Evaluation, list[Benchmark]]:
    """Check everything that can be checked before the work.

    Raises:
        UserError: See the functions called.
    """
    from moiie_megatron.evaluation.benchmarks.catalogue import SUITES, chosen
    from moiie_megatron.evaluation.benchmarks.data_sets import DataPlaces
    from moiie_megatron.evaluation.benchmarks.environment import find_environment
    from moiie_megatron.evaluation.benchmarks.run import Evaluation, open_directory

    for name in ("limit", "batch_size", "max_new_tokens", "timeout", "retries"):
        check_range(arguments, name, 1)
    for name, value in (("model", arguments.model), ("--out", arguments.out)):
        if value is None:
            raise UserError(f"There is no {name}: give EXPORT or URL, and --out DIR.")
    for name in ("data", "include"):
        value = getattr(arguments, name)
        if value is not None and not Path(value).is_dir():
            raise UserError(f"--{name} is {value}, which is no directory: name another.")
    environment = find_environment(arguments.python, variables)
    include = None if arguments.include is None else Path(arguments.include).absolute()
    benchmarks = list(SUITES[arguments.suite or "paper"])
    if arguments.tasks is not None:
        benchmarks = chosen(arguments.tasks.split(","), known_tasks(environment, include))
    target = find_target(arguments, variables)
    is_server = target.lmms_model == "moiie_server"
    evaluation = Evaluation(
        target,
        Path(arguments.out).expanduser().absolute(),
        environment,
        DataPlaces.from_environment(variables, arguments.data),
        batch_size=arguments.batch_size or (16 if is_server else 8),
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        judge=find_judge(arguments, variables),
        include=include,
        routing=arguments.routing,
    )
    open_directory(evaluation)
    return evaluation, benchmarks


def known_tasks(environment: EvalEnvironment, include: Path | None) -> list[str]:
    """Names of lmms-eval's tasks, and of those in a directory of further ones."""
    import yaml

    names = list(environment.tasks)
    for file in sorted(include.rglob("*.yaml")) if include is not None else ():
        lines = [line for line in file.read_text().splitlines() if line.startswith("task:")]
        names += [str(yaml.safe_load(line)["task"]) for line in lines]
    return names


def find_target(arguments: argparse.Namespace, variables: Mapping[str, str]) -> Target:
    """The model, which exists.

    Raises:
        UserError: There is none, or options of another kind of model are given.
    """
    from moiie_megatron.evaluation.benchmarks.target import ExportTarget, ServerTarget, find_server

    name = arguments.model
    if name.startswith(("http://", "https://")):
        for option in ("expert", "routing"):
            if getattr(arguments, option):
                raise UserError(
                    f"--{option} is given and {name} is a server, whose experts are out of reach: "
                    "evaluate the export instead."
                )
        key = variables.get("OPENAI_API_KEY", "none")
        served = find_server(name, arguments.served, key)
        return ServerTarget(name.rstrip("/"), served, arguments.timeout, arguments.retries)
    if arguments.routing and arguments.expert is not None:
        raise UserError(
            f"--routing is given and --expert is {arguments.expert}, which every token takes: give "
            "one of the two."
        )
    if arguments.served is not None:
        raise UserError(
            f"--model is {arguments.served} and {name} is no URL: leave the option out, or give "
            "the URL of a server."
        )
    from moiie_megatron.exported.load import check_export  # imports torch

    directory = check_export(Path(name).expanduser().absolute())
    return ExportTarget(directory, arguments.device, arguments.dtype, arguments.expert)


def find_judge(arguments: argparse.Namespace, variables: Mapping[str, str]) -> JudgeServer | None:
    """The judge, if one is named."""
    from moiie_megatron.evaluation.benchmarks.environment import JudgeServer

    if arguments.judge_url is None:
        if arguments.judge_model is not None:
            raise UserError(
                f"--judge-model is {arguments.judge_model} without a server: add --judge-url URL."
            )
        return None
    key = variables.get("JUDGE_API_KEY") or variables.get("OPENAI_API_KEY") or "none"
    return JudgeServer(arguments.judge_url, arguments.judge_model, key)


def evaluate(evaluation: Evaluation, benchmarks: Sequence[Benchmark]) -> int:
    """Run, print and write; 1 if a benchmark has failed or has no data.

    Raises:
        UserError: Offline, no benchmark has its data; or a file cannot be read or written.
    """
    from moiie_megatron.evaluation.benchmarks.preflight import preflight, startable
    from moiie_megatron.evaluation.benchmarks.run import run
    from moiie_megatron.evaluation.benchmarks.table import (
        as_json,
        markdown,
        read_all,
        write_tables,
    )

    for line in preflight(benchmarks, evaluation):
        print(line, flush=True)
    if not startable(benchmarks, evaluation):
        raise UserError(
            "No benchmark has its data on this machine and the hub is not asked: get data as above "
            "and name their directory by --data, or unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE."
        )
    bad = 0
    for outcome, is_old in run(benchmarks, evaluation, bar):
        bad += outcome.status in ("failed", "no data")
        print(line_of(outcome) + (" (from before)" if is_old else ""), flush=True)
        if evaluation.routing and not is_old and outcome.status != "no data":
            draw_routing(evaluation.out / outcome.task)
        outcomes = read_all(evaluation.out)
        text = markdown(evaluation.target.description(), outcomes, evaluation.limit)
        values = as_json(evaluation.identity(), evaluation.target.description(), outcomes)
        write_tables(evaluation.out, text, values)
    print(f"\n{text}\nWritten to {evaluation.out}/results.md and results.json.")
    return 1 if bad else 0


def draw_routing(directory: Path) -> None:
    """Draw what the model has counted in the directory of a benchmark."""
    from moiie_megatron.analysis.routing.plots import plot_routing
    from moiie_megatron.evaluation.benchmarks.outcome import ROUTING_FILE
    from moiie_megatron.routing_stats.reading import read_routing

    if (directory / ROUTING_FILE).exists():
        plot_routing(read_routing(directory / ROUTING_FILE), directory)


def bar(benchmark: Benchmark) -> AbstractContextManager[Progress]:
    """A progress bar for the requests of one benchmark."""
    return progress_bar(benchmark.name, "records")


def line_of(outcome: Outcome) -> str:
    """One line about a benchmark that has ended."""
    score = "" if outcome.score is None else f" {outcome.metric} {outcome.score:.1f},"
    counts = f"{outcome.requests} requests, {outcome.errors} errors, {outcome.seconds:.0f} s"
    reason = f": {outcome.reason}" if outcome.reason else ""
    return f"{outcome.benchmark}: {outcome.status},{score} {counts}{reason}"


def list_benchmarks() -> None:
    """Print the catalogue."""
    from moiie_megatron.evaluation.benchmarks.catalogue import BENCHMARKS, PAPER

    print(f"{'name':<18} {'task of lmms-eval':<26} {'metric':<21} {'data set':<32} needs")
    for one in BENCHMARKS:
        needs = "judge" if one.judge else "submission server" if one.submission else ""
        suite = "" if one in PAPER else " (not in --suite paper)"
        print(
            f"{one.name:<18} {one.task:<26} {one.metric:<21} {one.data[0].name:<32} {needs}{suite}"
        )


if __name__ == "__main__":
    run_program(main)
