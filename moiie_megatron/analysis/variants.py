"""Compare runs that differ in ``moe.variant`` only: a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from moiie_megatron.analysis.curves import running_median
from moiie_megatron.analysis.figure import COLOURS, INK, save_png, tidy
from moiie_megatron.analysis.records import read_metrics
from moiie_megatron.analysis.scores import read_scores
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.planning.parameters import count_parameters
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records

NAMES = {"dense": "Dense", "vanilla": "Vanilla MoE", "modality": "Modality MoE", "moiie": "MoIIE"}
SCORES_FILE = "scores.json"
_SIZE = (9.0, 4.2)  # inches


@dataclass(frozen=True)
class VariantRun:
    """The results of a finished and evaluated run.

    Attributes:
        variant: ``moe.variant``.
        seed: ``train.seed``.
        records: The lines of ``metrics.jsonl``.
        questions: Number of held-out questions.
        accuracy: Fraction (0..1) of correct answers.
        blanked_accuracy: The same with every image blanked.
        activated: Parameters that process a token, vision encoder included.
        total: All parameters, vision encoder included.
    """

    variant: str
    seed: int
    records: Records
    questions: int
    accuracy: float
    blanked_accuracy: float
    activated: int
    total: int

    @property
    def loss(self) -> float:
        """Training loss per answer token, mean over the last tenth of the steps."""
        last = self.records[-max(1, len(self.records) // 10) :]
        return float(np.mean([record["lm_loss"] for record in last]))

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps without the first, which includes warm-up, if there are others."""
        return float(np.median([r["tokens_per_second"] for r in self.records[1:] or self.records]))


def read_run(output: str | Path) -> VariantRun:
    """Read the output directory of a run, with the scores of ``tools/accuracy.py`` in it.

    Raises:
        UserError: A file is missing or broken.
    """
    output = Path(output)
    config = load_saved_config(output / "config.yaml")
    scores = read_scores(output / SCORES_FILE)
    count = count_parameters(config)
    return VariantRun(
        variant=config.moe.variant,
        seed=config.train.seed,
        records=read_metrics(output / "metrics.jsonl", ("lm_loss", "tokens", "tokens_per_second")),
        questions=scores.questions,
        accuracy=scores.accuracy,
        blanked_accuracy=scores.blanked_accuracy,
        activated=count.activated,
        total=count.total,
    )


def by_variant(runs: Sequence[VariantRun]) -> dict[str, list[VariantRun]]:
    """The runs of each variant, in the paper's order.

    Raises:
        UserError: There is no run, or the seeds, steps, questions or data of the variants differ.
    """
    groups = {v: [run for run in runs if run.variant == v] for v in NAMES}
    groups = {variant: group for variant, group in groups.items() if group}
    if not groups:
        raise UserError("There are no runs to compare: train first.")
    first = next(iter(groups.values()))
    for variant, group in groups.items():
        for what, values in (
            ("seeds", [sorted(run.seed for run in g) for g in (first, group)]),
            ("steps", [{len(run.records) for run in g} for g in (first, group)]),
            ("questions", [{run.questions for run in g} for g in (first, group)]),
            # The same samples in the same order have the same numbers of tokens.
            ("tokens", [_tokens(g) for g in (first, group)]),
        ):
            if values[0] != values[1]:
                raise UserError(
                    f"{NAMES[variant]} and {NAMES[first[0].variant]} differ in their {what}: "
                    "compare runs with the same budget, seeds and data."
                )
    return groups


def format_table(runs: Sequence[VariantRun]) -> str:
    """A table with one line per variant: mean over its seeds, lowest and highest if several."""
    rows = [("", "accuracy", "blanked", "loss", "activated", "total", "tokens/s")]
    for variant, group in by_variant(runs).items():
        rows.append(
            (
                NAMES[variant],
                _cell([run.accuracy for run in group], ".1%"),
                _cell([run.blanked_accuracy for run in group], ".1%"),
                _cell([run.loss for run in group], ".4f"),
                f"{group[0].activated / 1e6:.2f} M",
                f"{group[0].total / 1e6:.2f} M",
                _cell([run.tokens_per_second for run in group], ".0f"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def to_json(runs: Sequence[VariantRun]) -> dict[str, list[dict[str, Any]]]:
    """The numbers of the table for each variant and seed."""
    keys = ("seed", "questions", "accuracy", "blanked_accuracy", "loss", "activated", "total")
    return {
        variant: [
            {key: getattr(run, key) for key in (*keys, "tokens_per_second")}
            | {"steps": len(run.records)}
            for run in group
        ]
        for variant, group in by_variant(runs).items()
    }


def plot_variants(runs: Sequence[VariantRun], out: str | Path) -> Path:
    """Write training loss by step and accuracy, with and without images, as PNG."""
    return save_png(variants_figure(runs), out)


def variants_figure(runs: Sequence[VariantRun]) -> Figure:
    """The figure of ``plot_variants``; panels: loss, accuracy."""
    groups = by_variant(runs)
    figure = Figure(figsize=_SIZE, layout="constrained")
    loss, accuracy = figure.subplots(1, 2, width_ratios=[1.7, 1.0])
    _plot_losses(loss, groups)
    _plot_accuracies(accuracy, groups)
    return figure


def _plot_losses(axes: Axes, groups: Mapping[str, list[VariantRun]]) -> None:
    """The mean over seeds, and its running median."""
    for (variant, group), colour in zip(groups.items(), COLOURS, strict=False):
        steps = np.array([record["step"] for record in group[0].records])
        values = np.mean([[r["lm_loss"] for r in run.records] for run in group], axis=0)
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.2)
        axes.plot(steps, running_median(values), color=colour, linewidth=1.8, label=NAMES[variant])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    tidy(axes, "training loss per answer token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step", color=INK)
    axes.margins(x=0)
    axes.legend(frameon=False, labelcolor=INK)


def _plot_accuracies(axes: Axes, groups: Mapping[str, list[VariantRun]]) -> None:
    """Bars: means over seeds, with images in colour, blanked in grey; dots: each seed."""
    for position, (group, colour) in enumerate(zip(groups.values(), COLOURS, strict=False)):
        for shift, shade, values in (
            (-0.2, colour, [run.accuracy for run in group]),
            (0.2, "#c4c4c4", [run.blanked_accuracy for run in group]),
        ):
            mean = float(np.mean(values))
            axes.bar(position + shift, mean, width=0.36, color=shade)
            top = max(values) if len(values) > 1 else mean
            axes.annotate(
                f"{mean:.0%}",
                (position + shift, top),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=INK,
            )
            if len(values) > 1:
                axes.scatter([position + shift] * len(values), values, color=INK, s=6, zorder=3)
    axes.set_xticks(range(len(groups)), [NAMES[v].replace(" ", "\n") for v in groups])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.08)
    tidy(axes, "accuracy on held-out questions (grey: image blanked)")


def _tokens(group: Sequence[VariantRun]) -> list[list[Any]]:
    ordered = sorted(group, key=lambda run: run.seed)
    return [[record["tokens"] for record in run.records] for run in ordered]


def _cell(values: Sequence[float], form: str) -> str:
    mean = format(float(np.mean(values)), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"
