from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moiie_megatron.analysis.variants import (
    VariantRun,
    by_variant,
    format_table,
    plot_variants,
    read_run,
    to_json,
    variants_figure,
)
from moiie_megatron.config.load import dump_config
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import load_minimal


def _records(losses: list[float]) -> list[dict[str, Any]]:
    return [
        {"step": step, "lm_loss": loss, "tokens": 100, "tokens_per_second": 10.0 * step}
        for step, loss in enumerate(losses, start=1)
    ]


def _run(variant: str, seed: int = 1, accuracy: float = 0.5, **values: Any) -> VariantRun:
    plain = VariantRun(
        variant=variant,
        seed=seed,
        records=_records([2.0] * 19 + [1.0]),
        questions=20,
        accuracy=accuracy,
        blanked_accuracy=0.25,
        activated=1_100_000,
        total=1_500_000,
    )
    return replace(plain, **values)


RUNS = [_run("moiie", accuracy=0.75), _run("dense", total=1_100_000), _run("vanilla")]


def test_what_a_run_has_shown() -> None:
    run = _run("moiie")
    assert run.loss == 1.5  # of the last two steps
    assert run.tokens_per_second == 110.0  # the middle one of steps 2 to 20
    alone = _run("moiie", records=_records([3.0]))
    assert (alone.loss, alone.tokens_per_second) == (3.0, 10.0)


def test_table() -> None:
    assert format_table(RUNS) == (
        "             accuracy  blanked    loss  activated   total  tokens/s\n"
        "Dense           50.0%    25.0%  1.5000     1.10 M  1.10 M       110\n"
        "Vanilla MoE     50.0%    25.0%  1.5000     1.10 M  1.50 M       110\n"
        "MoIIE           75.0%    25.0%  1.5000     1.10 M  1.50 M       110"
    )


def test_table_of_several_seeds() -> None:
    runs = [_run("dense", 1, 0.5), _run("dense", 2, 0.7), _run("moiie", 2), _run("moiie", 1)]
    lines = format_table(runs).splitlines()
    assert lines[1].startswith("Dense  60.0% (50.0% to 70.0%)  25.0% (25.0% to 25.0%)  1.5000 (")
    assert lines[2].startswith("MoIIE  50.0% (50.0% to 50.0%)  ")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (_run("vanilla", seed=2), "seeds"),
        (_run("vanilla", records=_records([1.0])), "steps"),
        (_run("vanilla", questions=19), "questions"),
        (_run("vanilla", records=[r | {"tokens": 99} for r in _run("dense").records]), "tokens"),
    ],
)
def test_only_equal_budgets_are_compared(other: VariantRun, what: str) -> None:
    with user_error("Vanilla MoE", "Dense", what):
        by_variant([_run("dense"), other])


def test_nothing_to_compare() -> None:
    with user_error("runs"):
        by_variant([])


def test_json() -> None:
    values = to_json(RUNS)
    assert list(values) == ["dense", "vanilla", "moiie"]
    assert values["moiie"] == [
        {
            "seed": 1,
            "questions": 20,
            "accuracy": 0.75,
            "blanked_accuracy": 0.25,
            "loss": 1.5,
            "activated": 1_100_000,
            "total": 1_500_000,
            "tokens_per_second": 110.0,
            "steps": 20,
        }
    ]


def test_figure(tmp_path: Path) -> None:
    runs = [*RUNS, *(replace(run, seed=2, accuracy=1.0) for run in RUNS)]
    loss, accuracy = variants_figure(runs).axes
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["Dense", "Vanilla MoE", "MoIIE"]
    # Faint and smoothed, per variant.
    assert len(loss.get_lines()) == 6
    heights = [bar.get_height() for bar in accuracy.patches]
    assert heights == [0.75, 0.25, 0.75, 0.25, 0.875, 0.25]

    with Image.open(plot_variants(RUNS, tmp_path / "out.png")) as image:
        assert image.size == (1350, 630)


def test_read_run(tmp_path: Path) -> None:
    config = load_minimal(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in _records([2.0])))

    with user_error(tmp_path / "scores.json"):
        read_run(tmp_path)

    scores = {"questions": 4, "accuracy": 0.5, "blanked_accuracy": 0.0}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    run = read_run(tmp_path)
    assert (run.variant, run.seed, run.questions, run.accuracy) == ("moiie", 1234, 4, 0.5)
    assert run.activated < run.total
