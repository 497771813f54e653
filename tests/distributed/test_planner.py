"""Real steps against their simulations, as ``benchmarks/planner.py`` compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import command, run

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

CASES = {
    2: ("EP=2, packing, full", "PP=2, two virtual stages", "dense, TP=2 without SP"),
    4: ("TP=2, ETP=2, EP=2, alltoall",),
}
# Groups whose collectives a layout cannot do without.
GROUPS = {
    "EP=2, packing, full": {"ep", "dp"},
    "PP=2, two virtual stages": {"pp"},
    "dense, TP=2 without SP": {"tp"},
    "TP=2, ETP=2, EP=2, alltoall": {"tp", "ep", "expt_tp", "dp"},
}


def assert_alike(rank: dict[str, Any], name: str) -> None:
    """All numbers but the kernels', which differ by those that read values."""
    for kind, (simulated, real) in rank["states"].items():
        assert simulated == real > 0, kind
    for kind in ("peak", "flops"):
        simulated, real = rank[kind]
        assert simulated == real > 0, kind
    simulated, real = rank["expert_rows"]
    assert simulated == real
    if not name.startswith("dense"):
        assert all(count > 0 for rows in real.values() for count in rows)
    for call, (simulated, real) in rank["wire"].items():
        assert simulated == real, call
    assert GROUPS[name] <= {call.split()[0] for call in rank["wire"]}


@pytest.mark.parametrize("world", sorted(CASES))
def test_a_simulated_step_is_a_real_one(world: int, tmp_path: Path) -> None:
    words = ["--out", tmp_path, "--micro-batches", "2", "--cases", ";".join(CASES[world])]
    run(command("benchmarks/planner_exact.py", words, world), 250).check()
    for name in CASES[world]:
        for rank in range(world):
            assert_alike(json.loads((tmp_path / f"{name}.{rank}.json").read_text()), name)
