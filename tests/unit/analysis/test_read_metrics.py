"""Metrics are read as they were written."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.analysis.records import read_metrics
from tests.helpers.user_errors import user_error


def test_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_metrics(file)] == [1, 2]
    file.write_text("")
    with user_error(file, "no steps"):
        read_metrics(file)
