"""Routing logs are read as they were written."""

from __future__ import annotations

import json
from pathlib import Path

from moiie_megatron.routing_stats.reading import newest, read_routing
from tests.helpers.user_errors import user_error
from tests.unit.routing_stats.routing_records import RECORDS


def test_newest_records_cover_the_steps() -> None:
    """The last record covers 5 steps, the two before 10 each."""
    covered = [[r["step"] for r in newest(RECORDS, n)] for n in (1, 5, 6, 15, 16, 100)]
    assert covered == [[25], [25], [20, 25], [20, 25], [10, 20, 25], [10, 20, 25]]


def test_records_have_a_version(tmp_path: Path) -> None:
    file = tmp_path / "routing.jsonl"
    line = json.dumps(RECORDS[0])
    file.write_text(line + "\n")
    assert read_routing(file) == RECORDS[:1]
    file.write_text(line + '\n{"version": 2}\n')
    with user_error(file, "version 2"):
        read_routing(file)
    file.write_text("")
    with user_error(file, "no routing records"):
        read_routing(file)
