"""One process of lmms-eval for each benchmark, which may fail without ending the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moiie_megatron.evaluation.benchmarks.catalogue import Benchmark
from moiie_megatron.evaluation.benchmarks.data_sets import DataPlaces
from moiie_megatron.evaluation.benchmarks.environment import (
    EvalEnvironment,
    JudgeServer,
    task_variables,
)
from moiie_megatron.evaluation.benchmarks.outcome import (
    ANSWERS_FILE,
    LMMS_DIRECTORY,
    LOG_FILE,
    ROUTING_FILE,
    Outcome,
    read_outcome,
)
from moiie_megatron.evaluation.benchmarks.target import Target, argument_path, model_args
from moiie_megatron.mcore.process_lifetime import start_child
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import write_output
from moiie_megatron.utils.json_file import read_json_object

IDENTITY_FILE: Final = "evaluation.json"
_PROGRESS: Final = re.compile(r"moiie progress (\d+) (\d+)\s*$")

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Evaluation:
    """A model, where it is evaluated and how.

    Attributes:
        target: The model.
        out: Directory of all results.
        environment: With lmms-eval.
        places: Of the data sets.
        batch_size: Requests together; at a server, at a time.
        limit: Only the first rows of each benchmark.
        max_new_tokens: Upper limit on what the tasks ask for.
        judge: For tasks that need one.
        include: Directory of further tasks of lmms-eval.
        routing: Whether an export's expert choices are counted, in a file beside the answers.
    """

    target: Target
    out: Path
    environment: EvalEnvironment
    places: DataPlaces
    batch_size: int = 1
    limit: int | None = None
    max_new_tokens: int | None = None
    judge: JudgeServer | None = None
    include: Path | None = None
    routing: bool = False

    def directory(self, benchmark: Benchmark) -> Path:
        """Where everything about one benchmark is."""
        return self.out / benchmark.task

    def identity(self) -> dict[str, Any]:
        """What the results depend on."""
        return {
            **self.target.identity(),
            "limit": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "routing": self.routing,
            "lmms_eval": self.environment.version,
        }


def open_directory(evaluation: Evaluation) -> None:
    """Make the directory of results, or see that it is of the same evaluation.

    Raises:
        UserError: It is of another one, holds something else, or cannot be written.
    """
    file = evaluation.out / IDENTITY_FILE
    argument_path(evaluation.out)
    if file.exists():
        found = read_json_object(file, "name another --out")
        wanted = evaluation.identity()
        different = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if different:
            key = different[0]
            raise UserError(
                f"{evaluation.out} holds results with {key} = {found.get(key)}, not "
                f"{wanted.get(key)}: name another --out, or delete the directory."
            )
        return
    with suppress(FileNotFoundError, NotADirectoryError):
        if any(evaluation.out.iterdir()):
            raise UserError(
                f"{evaluation.out} is not empty and holds no {IDENTITY_FILE}: name another --out."
            )
    with write_output(file) as beside:
        beside.write_text(json.dumps(evaluation.identity(), indent=1) + "\n", encoding="utf-8")


def command(benchmark: Benchmark, evaluation: Evaluation) -> list[str]:
    """The command of lmms-eval for one benchmark."""
    directory = evaluation.directory(benchmark)
    arguments = {
        **evaluation.target.arguments(),
        "answers": argument_path(directory / ANSWERS_FILE),
        "max_new_tokens": evaluation.max_new_tokens,
        "routing": argument_path(directory / ROUTING_FILE) if evaluation.routing else None,
    }
    words = [str(evaluation.environment.python), "-m", "lmms_eval", "eval"]
    words += ["--model", evaluation.target.lmms_model, "--model_args", model_args(arguments)]
    words += ["--tasks", benchmark.task, "--batch_size", str(evaluation.batch_size)]
    words += ["--output_path", str(directory / LMMS_DIRECTORY), "--log_samples"]
    if evaluation.limit is not None:
        words += ["--limit", str(evaluation.limit)]
    if evaluation.include is not None:
        words += ["--include_path", str(evaluation.include)]
    if benchmark.judge is not None and evaluation.judge is None:
        words += ["--predict_only"]
    return words


def run(
    benchmarks: Sequence[Benchmark],
    evaluation: Evaluation,
    progress: Callable[[Benchmark], Any],
    variables: Mapping[str, str] = os.environ,
) -> Iterator[tuple[Outcome, bool]]:
    """Evaluate the benchmarks one after another.

    Args:
        benchmarks: Those that an earlier command has finished are not run again.
        evaluation: See ``Evaluation``.
        progress: Context manager around one benchmark that yields what takes (done, total).
        variables: Environment of the processes.

    Yields:
        Each outcome, and whether an earlier command has it.

    Raises:
        UserError: A file cannot be read or written.
    """
    for benchmark in benchmarks:
        directory = evaluation.directory(benchmark)
        before = Outcome.read(directory)
        if before is not None and before.is_final:
            yield before, True
            continue
        missing = evaluation.places.missing(benchmark)
        if missing and evaluation.places.offline:
            names = ", ".join(sorted({data.name for data in missing}))
            outcome = Outcome(
                benchmark.name, benchmark.task, "no data", reason=f"{names} is not on this machine"
            )
        else:
            with progress(benchmark) as report:
                outcome = _run_one(benchmark, evaluation, report, variables)
        directory.mkdir(parents=True, exist_ok=True)
        outcome.write(directory)
        yield outcome, False


def _run_one(
    benchmark: Benchmark, evaluation: Evaluation, report: Progress, variables: Mapping[str, str]
) -> Outcome:
    directory = evaluation.directory(benchmark)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / LMMS_DIRECTORY, ignore_errors=True)  # of an earlier attempt
    start = time.monotonic()
    with (directory / LOG_FILE).open("w", encoding="utf-8", errors="replace") as log:
        child = start_child(
            command(benchmark, evaluation),
            cwd=evaluation.places.directory,
            env=task_variables(
                benchmark,
                evaluation.judge,
                {**variables, **evaluation.places.variables(benchmark)},
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                counts = _PROGRESS.search(line)
                if counts is None:
                    log.write(line)
                    log.flush()
                else:
                    report(int(counts[1]), int(counts[2]))
            child.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # also what it has started
            child.wait()
    return read_outcome(
        benchmark,
        directory,
        has_judge=evaluation.judge is not None,
        seconds=time.monotonic() - start,
    )
