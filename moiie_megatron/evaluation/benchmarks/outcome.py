"""The outcome of one benchmark, read from what lmms-eval and its model have written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from moiie_megatron.evaluation.benchmarks.catalogue import Benchmark
from moiie_megatron.evaluation.benchmarks.plugin.kept_answers import read_answers
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import write_output
from moiie_megatron.utils.json_file import read_json_object

ANSWERS_FILE: Final = "answers.jsonl"
LOG_FILE: Final = "lmms_eval.log"
ROUTING_FILE: Final = "routing.jsonl"
OUTCOME_FILE: Final = "outcome.json"
LMMS_DIRECTORY: Final = "lmms_eval"  # what lmms-eval writes: results, samples, submissions
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")

Status = Literal["scored", "unscored", "submission", "failed", "no data"]


@dataclass(frozen=True)
class Outcome:
    """One benchmark.

    Attributes:
        benchmark: Its name.
        task: Of lmms-eval.
        status: ``scored``; ``unscored``: answered, but no judge was named; ``submission``: a file
            for a submission server was written; ``failed``; ``no data``.
        metric: Of the score.
        score: In the table's unit; None if there is none.
        metrics: All that the task reports, in lmms-eval's units.
        requests: Asked so far.
        errors: How many of them have no answer, and count as answered wrongly.
        reason: Why there is no score, or the first error.
        files: For a submission server.
        seconds: That the task took, without those of interrupted attempts.
    """

    benchmark: str
    task: str
    status: Status
    metric: str | None = None
    score: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    requests: int = 0
    errors: int = 0
    reason: str = ""
    files: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def is_final(self) -> bool:
        """Whether the same command need not run the task again."""
        return self.status in ("scored", "submission")

    def write(self, directory: Path) -> None:
        """Write it as JSON.

        Raises:
            UserError: It cannot be written.
        """
        with write_output(directory / OUTCOME_FILE) as file:
            file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Outcome | None:
        """What an earlier command has written; None if nothing.

        Raises:
            UserError: The file is damaged.
        """
        path = directory / OUTCOME_FILE
        if not path.exists():
            return None
        advice = "delete it, and the same command scores the task again"
        try:
            value = read_json_object(path, advice)
            return cls(**{**value, "files": tuple(value["files"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not an outcome ({error}): {advice}.") from error


def read_outcome(
    benchmark: Benchmark, directory: Path, *, has_judge: bool, seconds: float
) -> Outcome:
    """What a finished process of lmms-eval has left in the directory of its task.

    Args:
        has_judge: Whether the task could reach a judge, if it needs one.
        seconds: That it took.
    """
    answers = read_answers(directory / ANSWERS_FILE).values()
    errors = [answer.error for answer in answers if answer.error]
    common: dict[str, Any] = {
        "benchmark": benchmark.name,
        "task": benchmark.task,
        "requests": len(answers),
        "errors": len(errors),
        "seconds": round(seconds, 1),
    }
    metrics = _read_metrics(benchmark, directory / LMMS_DIRECTORY)
    if metrics is None:
        return Outcome(status="failed", reason=_last_error(directory / LOG_FILE), **common)
    if benchmark.judge is not None and not has_judge:
        return Outcome(status="unscored", reason="needs a judge: --judge-url", **common)
    reason = errors[0] if errors else ""
    if benchmark.submission is not None:
        written = sorted(map(str, (directory / LMMS_DIRECTORY / "submissions").glob("*")))
        reason = f"upload the file to {benchmark.submission}"
        return Outcome(status="submission", files=tuple(written), reason=reason, **common)
    metric, score = _score(benchmark, metrics)
    if benchmark.metric is not None and score is None:
        reason = f"lmms-eval reports no {benchmark.metric}, but {', '.join(metrics) or 'nothing'}"
        return Outcome(status="failed", metrics=metrics, reason=reason, **common)
    return Outcome(
        status="scored", metric=metric, score=score, metrics=metrics, reason=reason, **common
    )


def _read_metrics(benchmark: Benchmark, directory: Path) -> dict[str, float] | None:
    """The numbers of the newest complete results file by metric, or None without one.

    Names of filters are left out.
    """
    files = sorted(directory.rglob("*_results.json"), key=lambda file: file.stat().st_mtime)
    for file in reversed(files):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["results"][benchmark.task]
        except (ValueError, KeyError):  # killed while it was written
            continue
        names = {key: key.partition(",")[0] for key in found if "," in key and "stderr" not in key}
        # MathVista says nothing (None) where no answer is right.
        return {names[key]: float(found[key] or 0.0) for key in names if _is_number(found[key])}
    return None


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _score(benchmark: Benchmark, metrics: Mapping[str, float]) -> tuple[str | None, float | None]:
    metric = benchmark.metric or next(iter(metrics), None)
    value = metrics.get(metric) if metric is not None else None
    return metric, None if value is None else round(value * benchmark.scale, 2)


def _last_error(log: Path) -> str:
    """The line of a log that says why lmms-eval ended."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [_COLOURS.sub("", line).strip() for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    # lmms-eval tries again and then says only that it has.
    errors = [line for line in errors if not line.startswith("tenacity.RetryError")] or errors
    reason = errors[-1] if errors else next((line for line in reversed(lines) if line), "")
    return f"{' '.join(reason.split())[:200] or 'lmms-eval ended without a word'} (see {log})"
