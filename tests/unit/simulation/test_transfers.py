"""Bytes that leave a rank in a collective."""

from __future__ import annotations

import pytest

from moiie_megatron.evaluation.collective_recorder import Call
from moiie_megatron.simulation.transfers import bytes_sent

MEMBERS = (2, 6, 10, 14)  # four ranks of a job, of which 6 is asked
SHARD, WHOLE = (("bfloat16", (8, 16)),), (("bfloat16", (32, 16)),)
NBYTES = 2 * 32 * 16


@pytest.mark.parametrize(
    ("operation", "inputs", "outputs", "expected"),
    [
        ("all_reduce", WHOLE, WHOLE, NBYTES * 3 // 2),
        ("reduce_scatter_single", WHOLE, SHARD, NBYTES * 3 // 4),
        ("reduce_scatter_single_coalesced", WHOLE * 2, SHARD * 2, 2 * NBYTES * 3 // 4),
        ("all_gather_single", SHARD, WHOLE, NBYTES * 3 // 4),
        ("all_gather_single_coalesced", SHARD * 2, WHOLE * 2, 2 * NBYTES * 3 // 4),
        ("send", WHOLE, (), NBYTES),
        ("recv", (), WHOLE, 0),
    ],
)
def test_rings_and_messages(operation: str, inputs: tuple, outputs: tuple, expected: int) -> None:
    assert bytes_sent(Call("group", MEMBERS, operation, inputs, outputs), 6) == expected


@pytest.mark.parametrize(("rank", "own"), [(2, 1), (6, 5), (10, 0), (14, 26)])
def test_an_all_to_all_sends_all_but_the_own_rows(rank: int, own: int) -> None:
    call = Call("group", MEMBERS, "all_to_all_single", WHOLE, SHARD, input_splits=(1, 5, 0, 26))
    assert bytes_sent(call, rank) == (32 - own) * 16 * 2
    nothing = Call("group", MEMBERS, "all_to_all_single", (("bfloat16", (0, 16)),), SHARD)
    nothing = Call(**(vars(nothing) | {"input_splits": (0, 0, 0, 0)}))
    assert bytes_sent(nothing, rank) == 0
