"""Metrics are read as they were logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.analysis.records import read_metrics


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_metrics(file)] == [1, 2]


def test_unusable_files(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match="cannot be read"):
        read_metrics(file)
    file.write_text("")
    with pytest.raises(ValueError, match="holds no steps"):
        read_metrics(file)
    file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        read_metrics(file)
