"""The MoIIE dispatcher over 1, 2 and 4 expert-parallel ranks (see dispatcher_worker.py)."""

from __future__ import annotations

import json

import pytest

from tests.helpers.launch import command, run
from tests.parity.blocks import BLOCKS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_against_alltoall_a_loop_and_the_reference(processes: int) -> None:
    words = command("tests/distributed/dispatcher_worker.py", [], processes)
    passed = json.loads(run(words, 240).check().stdout.splitlines()[-1])
    wanted = {f"golden {name} {case}" for name, _, case in BLOCKS}
    for layer, experts in (("e4", 4), ("e8", 8)):
        wanted |= {f"bitwise {layer} {dtype}" for dtype in ("torch.float32", "torch.bfloat16")}
        wanted.add(f"0 to k {layer}")
        if experts > processes:  # several experts on a rank: rows may be sent once for both
            wanted.add(f"rows {layer}")
        else:
            wanted.add(f"kernels {layer}")
    assert sorted(passed) == sorted(wanted)
