"""Collectives on the links of a node and between nodes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moiie_megatron.planning.hardware import gpu
from moiie_megatron.planning.timing.links import crosses_nodes, transfer_seconds
from tests.unit.planning.traces import trace, transfer

H100 = gpu("h100")  # 450 GB/s in a node of 8, 50 GB/s between nodes
SENT = 450 * 10**9


def seconds(members: Sequence[int], operation: str, *, stages: int = 1, rank: int = 0) -> float:
    one = transfer("group", members, operation, calls=0, bytes_sent=SENT)
    whole = trace(one, rank=rank, world=64)
    return transfer_seconds(one, whole, stages, H100, H100.fast) * H100.fast.links


@pytest.mark.parametrize(
    ("members", "operation", "expected"),
    [
        (range(8), "all_reduce", 1.0),
        # A ring through nodes of eight members has eight network ports at each.
        (range(64), "all_reduce", 450 / (8 * 50)),
        (range(0, 64, 8), "all_gather_single", 9.0),
        (range(0, 64, 2), "reduce_scatter_single", 450 / (4 * 50)),
        # Of an all-to-all among 16 ranks 8 of 15 parts go to the other node.
        (range(16), "all_to_all_single", 9.0 * 8 / 15),
        (range(0, 64, 8), "all_to_all_single", 9.0),
        (range(8), "all_to_all_single", 1.0),
    ],
)
def test_bandwidth(members: Sequence[int], operation: str, expected: float) -> None:
    assert seconds(members, operation) == pytest.approx(expected)


def test_a_stage_sends_to_its_neighbours() -> None:
    """Whatever group the messages were traced in."""
    assert seconds(range(64), "send", stages=16, rank=9) == pytest.approx(9.0)  # 5 and 13
    small = gpu("h100", gpus_per_node=64)
    one = transfer("pp", range(64), "send", bytes_sent=SENT)
    assert not crosses_nodes(one, trace(one, rank=9, world=64), 16, small)


def test_every_call_waits() -> None:
    one = transfer("tp", (0, 1), calls=100)
    found = transfer_seconds(one, trace(one, world=2), 1, H100, H100.slow)
    assert found == pytest.approx(100 * H100.slow.latency)
