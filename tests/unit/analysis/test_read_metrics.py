"""Logs are read as they were written."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.analysis.records import read_metrics, read_routing
from tests.helpers.user_errors import user_error


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_metrics(file)] == [1, 2]


def test_unusable_files(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with user_error(file):
        read_metrics(file)
    file.write_text("")
    with user_error(file, "no steps"):
        read_metrics(file)
    file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with user_error(file, "line 2"):
        read_metrics(file)


def test_routing_records_have_a_version(tmp_path: Path) -> None:
    file = tmp_path / "routing.jsonl"
    file.write_text('{"version": 1, "step": 4}\n')
    assert read_routing(file)[0]["step"] == 4
    file.write_text('{"version": 1}\n{"version": 2}\n')
    with user_error(file, "version 2", "version 1"):
        read_routing(file)
    file.write_text("")
    with user_error(file, "routing records"):
        read_routing(file)
