"""Logs are read as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.analysis.records import read_metrics, read_routing


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


def test_routing_records_have_a_version(tmp_path: Path) -> None:
    file = tmp_path / "routing.jsonl"
    file.write_text('{"version": 1, "step": 4}\n')
    assert read_routing(file)[0]["step"] == 4
    file.write_text('{"version": 1}\n{"version": 2}\n')
    with pytest.raises(ValueError, match="version 2, this program reads version 1"):
        read_routing(file)
    file.write_text("")
    with pytest.raises(ValueError, match="holds no routing records"):
        read_routing(file)
