"""The table of all benchmarks beside the paper's averages, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from moiie_megatron.evaluation.benchmarks.catalogue import BENCHMARKS, averaged
from moiie_megatron.evaluation.benchmarks.outcome import Outcome
from moiie_megatron.evaluation.benchmarks.paper_figures import PAPER_AVERAGES
from moiie_megatron.utils.files import write_output

MARKDOWN_FILE: Final = "results.md"
JSON_FILE: Final = "results.json"
_AVERAGED: Final = {benchmark.name for benchmark in BENCHMARKS if averaged(benchmark)}
_ORDER: Final = {benchmark.name: i for i, benchmark in enumerate(BENCHMARKS)}


def read_all(out: Path) -> list[Outcome]:
    """Every outcome in a directory of results, in the catalogue's order.

    Raises:
        UserError: A file is damaged.
    """
    found = (Outcome.read(path) for path in sorted(out.iterdir()) if path.is_dir())
    outcomes = [outcome for outcome in found if outcome is not None]
    return sorted(outcomes, key=lambda o: (_ORDER.get(o.benchmark, len(_ORDER)), o.benchmark))


def mean(outcomes: Iterable[Outcome]) -> tuple[float | None, int]:
    """The mean in percent of the benchmarks that the paper averages, and how many have a score."""
    scores = [
        outcome.score
        for outcome in outcomes
        if outcome.benchmark in _AVERAGED and outcome.score is not None
    ]
    return (round(sum(scores) / len(scores), 2) if scores else None), len(scores)


def markdown(model: str, outcomes: list[Outcome], limit: int | None) -> str:
    """The table, and the paper's averages below it."""
    average, count = mean(outcomes)
    lines = [f"# {model}", ""]
    if limit is not None:
        lines += [f"Only the first {limit} rows of each benchmark: not to be compared.", ""]
    lines += ["| benchmark | metric | score | answered | remark |", "|---|---|---|---|---|"]
    lines += [_row(outcome) for outcome in outcomes]
    if average is not None:
        lines.append(f"| **mean** of {count} of {len(_AVERAGED)} | | **{average:.1f}** | | |")
    lines += ["", "The paper's averages over 13 benchmarks (arXiv 2508.09779), in percent:", ""]
    lines += ["| model | Dense | Vanilla MoE | Modality MoE | MoIIE |", "|---|---|---|---|---|"]
    lines += [
        f"| {p.model} | {p.dense} | {p.vanilla} | {p.modality} | {p.moiie} |"
        for p in PAPER_AVERAGES
    ]
    return "\n".join(lines) + "\n"


def as_json(identity: Mapping[str, Any], model: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """The same numbers, for programs."""
    average, count = mean(outcomes)
    return {
        "model": model,
        "evaluation": dict(identity),
        "benchmarks": {outcome.benchmark: asdict(outcome) for outcome in outcomes},
        "mean": average,
        "mean_of": count,
        "paper_averages": [asdict(figures) for figures in PAPER_AVERAGES],
    }


def write_tables(out: Path, text: str, values: Mapping[str, Any]) -> None:
    """Write both files into the directory of results.

    Raises:
        UserError: They cannot be written.
    """
    with write_output(out / MARKDOWN_FILE) as file:
        file.write_text(text, encoding="utf-8")
    with write_output(out / JSON_FILE) as file:
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _row(outcome: Outcome) -> str:
    score = "-" if outcome.score is None else f"{outcome.score:.1f}"
    answered = f"{outcome.requests - outcome.errors} of {outcome.requests}"
    remark = outcome.reason if outcome.status == "scored" else f"{outcome.status}: {outcome.reason}"
    remark = remark.replace("|", "/")
    return f"| {outcome.benchmark} | {outcome.metric or ''} | {score} | {answered} | {remark} |"
