"""Reports of the audit: what is read, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.planning.samples.data_report import read_report
from moiie_megatron.selftest.checks.models import tiny_config
from tests.helpers.user_errors import user_error
from tests.unit.planning.samples.data_reports import report_values, write_report

SIZES = [(40, 1, 5), (20, 0, 9), (20, 0, 7), (64, 2, 3)]


def test_what_is_read(tmp_path: Path) -> None:
    values = report_values(SIZES, SIZES[:1], weights=(0.5, 2))
    values["sources"].append(
        {"name": "unusable", "weight": 1.0, "samples": 3, "shapes": None, "more": "ignored"}
    )
    report = read_report(write_report(tmp_path / "report.json", values))
    assert (report.name, report.sequence_length, report.num_image_tokens) == ("report.json", 64, 16)
    first, second, unusable = report.sources
    assert (first.weight, first.records, second.weight, unusable.records) == (0.5, 4, 2, 3)
    assert first.tokens.tolist() == [40, 40, 64] and first.samples.tolist() == [2, 1, 1]
    assert first.labels.tolist() == [16, 5, 3] and first.most_labels.tolist() == [9, 5, 3]
    assert len(unusable.samples) == 0
    config = tiny_config(1, "fp32")
    report.check(config)
    longer = config.model_copy(
        update={"data": config.data.model_copy(update={"sequence_length": 128})}
    )
    with user_error("report.json", "data.sequence_length", 64, 128, "prepare_data.py validate"):
        report.check(longer)


def change(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    values["sources"][0]["shapes"][key] = value
    return values


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ([], ["JSON object"]),
        ({"steps": 3}, ["no report of prepare_data.py validate"]),
        ({"sources": [1]}, ["no report of prepare_data.py validate"]),
        ({"samples": 2, "sources": [{"lengths": {"min": 1}}]}, ["older report"]),
        ({"encoding": None, "sources": [{"name": "x"}]}, ["without a tokenizer"]),
        (report_values(SIZES) | {"sources": []}, ["no sample that can be used"]),
        (change(report_values(SIZES), "samples", "x"), ["sources.0.shapes.samples"]),
        (change(report_values(SIZES), "samples", [1, 1]), ["different lengths"]),
        (change(report_values(SIZES), "samples", [9, 1, 1]), ["11 samples of 4 records"]),
        (change(report_values(SIZES), "tokens", [40, 20, 64]), ["20 tokens in 1 samples"]),
        (change(report_values(SIZES), "tokens", [40, 40, 65]), ["65 tokens in 1 samples"]),
    ],
)
def test_other_files_are_refused(tmp_path: Path, values: Any, parts: list[str]) -> None:
    file = write_report(tmp_path / "report.json", values)
    advice = "repair" if "can be used" in parts[0] else "prepare_data.py validate"
    with user_error(file, advice, *parts):
        read_report(file)


def test_a_file_that_is_missing_or_damaged(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with user_error(file, "prepare_data.py validate"):
        read_report(file)
    file.write_text("{")
    with user_error(file, "prepare_data.py validate"):
        read_report(file)
