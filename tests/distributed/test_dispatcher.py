"""The MoIIE dispatcher over 1, 2 and 4 expert-parallel ranks (see dispatcher_worker.py)."""

from __future__ import annotations

import pytest

from tests.helpers.launch import command, run
from tests.parity.test_blocks import BLOCKS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_against_alltoall_a_loop_and_the_reference(processes: int) -> None:
    words = command("tests/distributed/dispatcher_worker.py", [], processes)
    passed = [
        line for line in run(words, 240).check().stdout.splitlines() if line.startswith("ok ")
    ]
    assert sum(line.startswith("ok bitwise") for line in passed) == 4
    assert sum(line.startswith("ok 0 to k") for line in passed) == 2
    assert sum(line.startswith("ok golden") for line in passed) == len(BLOCKS)
    assert any(line.startswith("ok rows") for line in passed)
