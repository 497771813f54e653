"""Files of one JSON object per line."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.utils.jsonl import read_records
from tests.helpers.user_errors import user_error


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_records(file)] == [1, 2]


def test_unusable_files(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with user_error(file):
        read_records(file)
    file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with user_error(file, "line 2"):
        read_records(file)
