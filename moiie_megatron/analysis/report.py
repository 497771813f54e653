"""A self-contained HTML report about the runs of one or several stages, from their logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined

from moiie_megatron.analysis.answers import Answers, read_answers
from moiie_megatron.analysis.curves import (
    curves_figure,
    evaluation_figure,
    step_figure,
    validation_figure,
)
from moiie_megatron.analysis.evaluations import Scores, read_scores_of
from moiie_megatron.analysis.figure import svg_data
from moiie_megatron.analysis.records import read_metrics
from moiie_megatron.analysis.routing.groups import groups_figure
from moiie_megatron.analysis.routing.load_map import load_map_figure
from moiie_megatron.analysis.routing.pathways import pathways_figure
from moiie_megatron.analysis.validations import Validations, read_validations
from moiie_megatron.checkpoint.directory import (
    CONFIG_FILE,
    checkpoints_directory,
    latest_checkpoint,
)
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.routing_stats.expert_use import MODALITY_TITLES, ExpertUse
from moiie_megatron.routing_stats.reading import newest, read_routing
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import write_output
from moiie_megatron.utils.jsonl import Records, read_records

_SHOWN = ("lm_loss", "seconds", "tokens_per_second")  # of every step
_ROWS = 100  # of a table of problems; further rows are only counted
_AVERAGED_STEPS = 50  # of the routing figures
_FINAL_STEPS = 20  # whose median is called the final loss
_WIDE, _TALL, _LOW = 6.4, 6.2, 4.2  # inches: legible on a phone too

# Files that a run may write besides its metrics: name, heading, description.
_PROBLEMS = (
    ("skipped_samples.jsonl", "Skipped samples", "Records or images that could not be used."),
    ("skipped_steps.jsonl", "Skipped steps", "Their loss or gradient was not finite."),
    ("loss_spikes.jsonl", "Loss spikes", "Steps whose loss is far above the recent median."),
)


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    scores: str | Path | None = None,
) -> Path:
    """Write the report; it needs no network to be read.

    Args:
        runs: Output directories, in the order of training.
        out: The HTML file.
        scores: The file that ``tools/accuracy.py --out`` wrote for the last run; None: no answers.

    Returns:
        ``out``.

    Raises:
        UserError: A directory is not that of a run, one of its files cannot be read, or the report
            cannot be written.
    """
    directories = [Path(run) for run in runs]
    if not directories:
        raise UserError("There is no run to report on: name an output directory.")
    names = _names(directories)
    stages = {
        name: _stage(name, directory) for name, directory in zip(names, directories, strict=True)
    }
    answers = None if scores is None else read_answers(scores)
    page = _render(stages, answers)
    out = Path(out)
    with write_output(out) as file:
        file.write_text(page, encoding="utf-8")
    return out


def _names(directories: Sequence[Path]) -> list[str]:
    """Names of the directories, numbered if two of them are equal."""
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) == len(names):
        return names
    return [f"{number}. {name}" for number, name in enumerate(names, start=1)]


def _render(stages: Mapping[str, dict[str, Any]], answers: Answers | None) -> str:
    metrics = {name: stage["metrics"] for name, stage in stages.items()}
    routed = [stage for stage in stages.values() if stage["routing"]]
    evaluated = {name: stage["evaluations"] for name, stage in stages.items()}
    validated = {name: stage["validations"] for name, stage in stages.items()}
    source = resources.files("moiie_megatron.analysis") / "templates" / "report.html"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        title=" / ".join(stages),
        stages=list(stages.values()),
        loss_figure=svg_data(curves_figure(metrics, (_WIDE, _TALL))),
        throughput_figure=svg_data(step_figure(metrics, (_WIDE, _LOW))),
        validations=_validations(metrics, validated),
        evaluations=_evaluations(metrics, evaluated),
        routing=_routing(routed[-1]["name"], routed[-1]["routing"]) if routed else None,
        answers=answers,
    )


def _validations(
    metrics: Mapping[str, Records], validated: Mapping[str, Validations]
) -> dict[str, Any] | None:
    """The curves of the loss on held-out samples, and a table; None without any."""
    if not any(one.rows for one in validated.values()):
        return None
    curves = {name: one.curves for name, one in validated.items()}
    return {
        "figure": svg_data(validation_figure(metrics, curves, (_WIDE, _LOW * 0.75))),
        "rows": [{"stage": name} | row for name, one in validated.items() for row in one.rows],
    }


def _evaluations(
    metrics: Mapping[str, Records], scores: Mapping[str, Scores]
) -> dict[str, Any] | None:
    """The curves of evaluations while training, and a table; None without any."""
    if not any(one.rows for one in scores.values()):
        return None
    curves = {name: one.curves for name, one in scores.items()}
    has_curves = any(curves.values())
    figure = evaluation_figure(metrics, curves, (_WIDE, _LOW)) if has_curves else None
    return {
        "figure": None if figure is None else svg_data(figure),
        "rows": [{"stage": name} | row for name, one in scores.items() for row in one.rows],
    }


def _stage(name: str, directory: Path) -> dict[str, Any]:
    """The values of the template for one run."""
    if not (directory / "config.yaml").is_file():
        raise UserError(
            f"{directory} is not the output directory of a run (it has no config.yaml): name one."
        )
    config = load_saved_config(directory / "config.yaml")
    metrics = read_metrics(directory / "metrics.jsonl", _SHOWN)
    routing = directory / "routing.jsonl"
    has_routing = routing.exists() and routing.stat().st_size > 0
    written = datetime.fromtimestamp((directory / "metrics.jsonl").stat().st_mtime, UTC)
    return {
        "name": name,
        "directory": str(directory),
        "config": (directory / "config.yaml").read_text(encoding="utf-8"),
        "facts": _facts(config),
        "figures": _figures(metrics),
        "written": written.strftime("%Y-%m-%d %H:%M UTC"),
        "metrics": metrics,
        "validations": read_validations(directory),
        "evaluations": read_scores_of(directory, last_step=metrics[-1]["step"]),
        "routing": read_routing(routing, of_training=True) if has_routing else [],
        "problems": _problems(directory),
        "skipped_samples": metrics[-1].get("skipped_samples", 0),
        "checkpoints": _checkpoints(directory),
    }


def _facts(config: RunConfig) -> dict[str, str]:
    """The main settings, shown before the complete configuration."""
    degrees = config.active_parallel
    parallel = {
        "TP": degrees.tensor,
        "PP": degrees.pipeline,
        "VPP": degrees.virtual_pipeline,
        "EP": degrees.expert,
        "ETP": degrees.expert_tensor,
    }
    used = ", ".join(f"{key} {value}" for key, value in parallel.items() if value > 1)
    layout = config.moe.layout
    experts = (
        f"{config.moe.variant}: {layout.num_vision} vision, {layout.num_shared} shared, "
        f"{layout.num_text} text, top-{layout.top_k}, {len(config.moe_layers)} layers"
    )
    return {
        "stage": config.stage.name,
        "trains": ", ".join(config.stage.learning_rates),
        "experts": experts if config.moe_layers else "none (dense)",
        "parallelism": used or "data parallelism only",
        "batch": f"{config.train.global_batch_size} samples, {config.train.precision}",
    }


def _figures(metrics: Records) -> dict[str, str]:
    losses = [record["lm_loss"] for record in metrics]
    seconds = sum(record["seconds"] for record in metrics)
    tokens = sum(record["tokens_per_second"] * record["seconds"] for record in metrics)
    return {
        "steps": f"{metrics[-1]['step']:,}",
        "first loss": f"{losses[0]:.3f}",
        "final loss": f"{median(losses[-_FINAL_STEPS:]):.3f}",
        "tokens": _short_number(tokens),
        "tokens/s": _short_number(median(record["tokens_per_second"] for record in metrics)),
        **_rates(metrics),
        "time": str(timedelta(seconds=round(seconds))),
    }


def _rates(metrics: Records) -> dict[str, str]:
    """Medians of what logs with these fields say of the hardware's use."""
    found = {}
    for key, title, spec in (
        ("tflops_per_rank", "TFLOP/s per rank", ".3g"),
        ("mfu", "MFU", ".1%"),
        ("data_wait_fraction", "waiting for data", ".1%"),
    ):
        values = [record[key] for record in metrics if key in record]
        if values:
            found[title] = format(median(values), spec)
    return found


def _short_number(value: float) -> str:
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            return f"{value / (1e3 if unit == ' k' else limit):.1f}{unit}"
    return f"{value:,.0f}"


def _problems(directory: Path) -> list[dict[str, Any]]:
    """One table for each file of problems that exists."""
    tables = []
    for file, title, meaning in _PROBLEMS:
        if not (directory / file).exists():
            continue
        records = read_records(directory / file)
        columns = list(dict.fromkeys(key for record in records for key in record))
        rows = [[_cell(record.get(column)) for column in columns] for record in records[:_ROWS]]
        tables.append(
            {"title": title, "meaning": meaning, "count": len(records)}
            | {"columns": columns, "rows": rows, "omitted": len(records) - len(rows)}
        )
    return tables


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    text = "" if value is None else str(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _checkpoints(directory: Path) -> list[dict[str, Any]]:
    newest_one = latest_checkpoint(directory)
    found = []
    for path in sorted(checkpoints_directory(directory).glob("step_*")):
        if not (path / CONFIG_FILE).is_file():
            continue
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        saved = datetime.fromtimestamp((path / CONFIG_FILE).stat().st_mtime, UTC)
        found.append(
            {
                "name": path.name,
                "size": f"{size / 1e6:,.1f} MB",
                "saved": saved.strftime("%Y-%m-%d %H:%M UTC"),
                "is_latest": path == newest_one,
            }
        )
    return found


def _routing(name: str, records: Records) -> dict[str, Any]:
    """The figures of a run with experts, and its last routing record as a table."""
    last = newest(records, _AVERAGED_STEPS)
    use = ExpertUse.from_records(last)
    record = records[-1]
    steps = sum(part["steps"] for part in last)
    layers = [
        {
            "number": number,
            "entropies": [_number(layer[modality]["entropy"]) for modality in MODALITY_TITLES],
            "max_over_mean": _number(layer["max_over_mean"]),
            "dead": ", ".join(record["experts"][expert] for expert in layer["dead"]) or "none",
        }
        for number, layer in record["layers"].items()
    ]
    moved = [
        {
            "kind": {**MODALITY_TITLES, "padding": "padding"}[kind],
            "rows": f"{part['rows'] / record['steps']:,.0f}",
            "remote_rows": f"{part['remote_rows'] / record['steps']:,.0f}",
            "megabytes": f"{part['bytes'] / record['steps'] / 1e6:,.2f}",
        }
        for kind, part in record["moved"].items()
    ]
    return {
        "name": name,
        "steps": steps,
        "first": record["step"] - record["steps"] + 1,
        "last": record["step"],
        "ranks": len(record["ranks"]),
        "pathways": svg_data(pathways_figure(use)),
        "groups": svg_data(groups_figure(use)),
        "load_map": svg_data(load_map_figure(records)),
        "layers": layers,
        "moved": moved if len(record["ranks"]) > 1 else [],
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
