"""Benchmarks of lmms-eval on the export of a checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from moiie_megatron.config.schema import EvaluationConfig
from moiie_megatron.evaluation.benchmarks.catalogue import Benchmark, chosen
from moiie_megatron.evaluation.benchmarks.data_sets import DataPlaces
from moiie_megatron.evaluation.benchmarks.environment import EvalEnvironment, find_environment
from moiie_megatron.evaluation.benchmarks.outcome import Outcome
from moiie_megatron.evaluation.benchmarks.run import Evaluation, open_directory, run
from moiie_megatron.evaluation.benchmarks.target import ExportTarget
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import ProgressFn


@dataclass(frozen=True)
class Tasks:
    """The benchmarks of a run, and what they need.

    Attributes:
        by_name: As the configuration names them.
        environment: With lmms-eval.
        places: Of the data sets.
    """

    by_name: dict[str, Benchmark]
    environment: EvalEnvironment
    places: DataPlaces


def read_tasks(evaluation: EvaluationConfig) -> Tasks | None:
    """The benchmarks of a run; None without any.

    Raises:
        UserError: There is no lmms-eval, it has no such benchmark, or one needs a judge or a
            submission server.
    """
    if not evaluation.tasks:
        return None
    environment = find_environment(None, os.environ)
    try:
        by_name = {name: chosen([name], environment.tasks)[0] for name in evaluation.tasks}
    except UserError as error:
        raise UserError(str(error).replace("--tasks", "evaluation.tasks", 1)) from error
    for name, benchmark in by_name.items():
        if benchmark.judge is not None or benchmark.submission is not None:
            needs = "a judge" if benchmark.judge is not None else "a submission server"
            raise UserError(
                f"evaluation.tasks has {name}, which needs {needs}: evaluate it with "
                "tools/evaluate.py."
            )
    return Tasks(
        by_name, environment, DataPlaces.from_environment(os.environ, evaluation.task_data)
    )


def task_digest(tasks: Tasks, name: str, evaluation: EvaluationConfig) -> str:
    """What a result depends on besides the checkpoint."""
    parts = (tasks.by_name[name].task, str(evaluation.task_limit), tasks.environment.version)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def run_task(
    tasks: Tasks,
    name: str,
    export: Path,
    out: Path,
    evaluation: EvaluationConfig,
    bar: Callable[[str], AbstractContextManager[ProgressFn]],
) -> Outcome:
    """Evaluate one benchmark; goes on from what an interrupted evaluation has left in ``out``.

    Raises:
        UserError: ``out`` cannot be used, or the benchmark has no score.
    """
    job = Evaluation(
        ExportTarget(export.absolute(), evaluation.device),
        out.absolute(),
        tasks.environment,
        tasks.places,
        batch_size=evaluation.batch_size,
        limit=evaluation.task_limit,
    )
    open_directory(job)
    ((outcome, _),) = run([tasks.by_name[name]], job, lambda _: bar(name))
    if outcome.score is None or outcome.metric is None:
        raise UserError(f"{name} has no score ({outcome.status}, {outcome.reason.rstrip('.')}).")
    return outcome


def value_of(outcome: Outcome, benchmark: Benchmark) -> float:
    """The score; a percentage of the catalogue's as a fraction."""
    assert outcome.score is not None
    is_percentage = benchmark.metric is not None and benchmark.percent
    return outcome.score / 100 if is_percentage else outcome.score
