"""What evaluations while training have found, for the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_megatron.training.logging.evaluations import Evaluated, read_evaluated
from moiie_megatron.utils.jsonl import Records


@dataclass(frozen=True)
class Scores:
    """The evaluated checkpoints of one run.

    Attributes:
        curves: By step: ``step``, and the value (0..1) of every set or task that has one.
        rows: For every set or task its last and its best value with their steps.
    """

    curves: Records
    rows: list[dict[str, Any]]


def read_scores_of(run: Path, last_step: int) -> Scores:
    """The results in a run's output directory; none where it has no evaluation.

    Args:
        run: The output directory.
        last_step: Results of later steps belong to a course of the run that was given up.
    """
    by_name: dict[str, list[Evaluated]] = defaultdict(list)
    for one in read_evaluated(run):
        if one.step <= last_step:
            by_name[one.name].append(one)
    curves: dict[int, dict[str, Any]] = {}
    for name, results in by_name.items():
        if all(0 <= one.value <= 1 for one in results):  # not a sum of points
            for one in results:
                curves.setdefault(one.step, {"step": one.step})[name] = one.value
    rows = [_row(results) for results in by_name.values()]
    return Scores([curves[step] for step in sorted(curves)], rows)


def _row(results: Sequence[Evaluated]) -> dict[str, Any]:
    last, best = results[-1], max(results, key=lambda one: (one.value, one.step))
    return {
        "name": last.name,
        "metric": last.metric,
        "last": last.shown,
        "last_step": f"{last.step:,}",
        "best": best.shown,
        "best_step": f"{best.step:,}",
        "questions": f"{last.questions:,}",
        "errors": f"{last.errors:,}",
    }
