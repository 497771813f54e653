"""Records of ranks that fit together, and records that differ in one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from moiie_megatron.evaluation.collective_order import find_conflict
from moiie_megatron.evaluation.collective_recorder import Call, Event, Wait

ROW = ("float32", (4, 8))
BOTH = (0, 1)


def reduction(group: str = "tp", members: tuple[int, ...] = BOTH) -> Call:
    return Call(group, members, "all_reduce", (ROW,), (ROW,), reduction="SUM")


def exchange(sent: tuple[int, ...], received: tuple[int, ...]) -> Call:
    kinds = [(("float32", (sum(rows), 8)),) for rows in (sent, received)]
    return Call("ep", BOTH, "all_to_all_single", *kinds, input_splits=sent, output_splits=received)


def send(peer: int, rows: int = 4) -> Call:
    return Call("pp", BOTH, "send", inputs=(("float32", (rows, 8)),), peer=peer)


def receive(peer: int, rows: int = 4) -> Call:
    return Call("pp", BOTH, "recv", outputs=(("float32", (rows, 8)),), peer=peer)


def test_equal_records_fit() -> None:
    record = [reduction(), reduction("dp"), reduction("alone", (0,))]
    assert find_conflict([record, record[:2]]) is None


def test_an_exchange_of_other_sizes_fits() -> None:
    assert find_conflict([[exchange((1, 3), (1, 5))], [exchange((5, 2), (3, 2))]]) is None


def test_sends_and_receives_fit() -> None:
    """Both directions at once: both ranks start both before they wait."""
    first = [send(1, 2), receive(1, 6), Wait((0, 1)), reduction()]
    second = [send(0, 6), receive(0, 2), Wait((0,)), Wait((1,)), reduction()]
    assert find_conflict([first, second]) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("operation", {"operation": "broadcast"}),
        ("dtype", {"inputs": (("int32", (4, 8)),), "outputs": (("int32", (4, 8)),)}),
        ("reduction", {"reduction": "MAX"}),
        ("root", {"peer": 0}),
        ("members", {"members": (1, 0)}),
        ("shape", {"inputs": (("float32", (8, 4)),), "outputs": (("float32", (8, 4)),)}),
    ],
)
def test_a_call_that_differs_is_found(name: str, change: dict[str, object]) -> None:
    other = replace(reduction(), **change)  # type: ignore[arg-type]
    conflict = find_conflict([[reduction(), reduction()], [reduction(), other]])
    assert conflict is not None and f"{name} differ" in conflict
    assert "rank 1 at event 1" in conflict


def test_a_skipped_call_is_found() -> None:
    conflict = find_conflict([[reduction(), reduction("dp")], [reduction("dp")]])
    assert conflict is not None and "no rank can go on" in conflict
    assert "rank 0 at event 0: all_reduce SUM in group tp [0, 1]" in conflict
    conflict = find_conflict([[reduction(), reduction("dp")], [reduction()]])
    assert conflict is not None and "rank 1 at event 1: the end" in conflict


def test_another_order_of_two_groups_is_found() -> None:
    """Each group alone has the same sequence on both ranks."""
    conflict = find_conflict([[reduction("tp"), reduction("dp")], [reduction("dp"), reduction()]])
    assert conflict is not None and "no rank can go on" in conflict


def test_a_cycle_over_three_ranks_is_found() -> None:
    pairs = [reduction(f"{a}{b}", (a, b)) for a, b in ((0, 1), (1, 2), (0, 2))]
    fits: list[list[Event]] = [[pairs[0], pairs[2]], [pairs[0], pairs[1]], [pairs[1], pairs[2]]]
    assert find_conflict(fits) is None
    assert find_conflict([fits[0], fits[1][::-1], fits[2][::-1]]) is not None


@pytest.mark.parametrize(
    "second",
    [
        [exchange((5, 2), (2, 2))],  # receives two rows of the three that are sent
        [replace(exchange((5, 2), (3, 2)), inputs=(("float32", (7, 9)),))],  # other rows
        [replace(exchange((5, 2), (3, 2)), inputs=(("float32", (8, 8)),))],  # a row too many
    ],
)
def test_an_exchange_that_does_not_fit_is_found(second: Sequence[Event]) -> None:
    conflict = find_conflict([[exchange((1, 3), (1, 5))], second])
    assert conflict is not None and "not what is received" in conflict


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ([send(1)], [receive(0), receive(0)], "1 sends and 2 receives"),
        # Both wait for the other before they send.
        ([receive(1), Wait((0,)), send(1)], [receive(0), Wait((0,)), send(0)], "no rank can go on"),
        ([send(1), Wait((0,))], [], "no rank can go on"),
    ],
)
def test_sends_and_receives_that_do_not_pair_are_found(
    first: list[Event], second: list[Event], reason: str
) -> None:
    conflict = find_conflict([first, second])
    assert conflict is not None and reason in conflict


def test_another_shape_received_is_found() -> None:
    conflict = find_conflict([[send(1, 4), Wait((0,))], [receive(0, 5), Wait((0,))]])
    assert conflict is not None and "send 0 from rank 0 to rank 1" in conflict


@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter", "gather", "scatter"])
def test_parts_of_different_lengths(operation: str) -> None:
    """Rank r has r + 1 rows; the whole, where it is, must list just these."""
    whole = tuple(("float32", (rows, 8)) for rows in (1, 2))
    calls = []
    for rank in BOTH:
        part = (whole[rank],)
        has_whole = operation in ("all_gather", "reduce_scatter") or rank == 0
        ends = [part, whole if has_whole else ()]
        if operation in ("reduce_scatter", "scatter"):
            ends.reverse()
        peer = 0 if operation in ("gather", "scatter") else None
        calls.append(Call("g", BOTH, operation, *ends, peer=peer))
    assert find_conflict([[call] for call in calls]) is None
    longer = (("float32", (3, 8)),)
    end = "outputs" if operation in ("reduce_scatter", "scatter") else "inputs"
    wrong = replace(calls[1], **{end: longer})  # type: ignore[arg-type]
    assert find_conflict([[calls[0]], [wrong]]) is not None
