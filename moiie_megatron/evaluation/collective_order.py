"""Whether the recorded collectives of all ranks fit together, so that none waits forever.

The ranks' records are replayed together under the strictest rules: a collective begins when all
members of its group have come to it, and a rank does nothing else before it is done, also where
the call was asynchronous.  Sends and receives block where they are waited for.  A replay that
comes to its end shows an order in which every communicator, on whatever stream, gets the same
operations from all its members.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from moiie_megatron.evaluation.collective_recorder import Call, Event, Wait


def find_conflict(records: Sequence[Sequence[Event]]) -> str | None:
    """Replay the records of all ranks together.

    Args:
        records: The events of each rank of the job, from rank 0 on.

    Returns:
        The first thing that does not fit, or None if everything does.
    """
    return _Replay(records).run()


def disagreement(calls: Sequence[Call]) -> str | None:
    """What the members of a group do not agree about in one collective.

    Args:
        calls: The call of each member, in the order of the group.
    """
    for name, read in _EQUAL.items():
        if len({read(call) for call in calls}) > 1:
            return f"{name} differs"
    check = _PARTS.get(calls[0].operation)
    if check is not None:
        return None if check(calls) else "what is sent is not what is received"
    return "the shape differs" if len({(c.inputs, c.outputs) for c in calls}) > 1 else None


class _Replay:
    """Positions of all ranks in their records, and the sends and receives under way."""

    def __init__(self, records: Sequence[Sequence[Event]]) -> None:
        self.records = records
        self.positions = [0] * len(records)
        # By group, sender and receiver.
        self.sent: dict[tuple[str, int, int], list[Call]] = defaultdict(list)
        self.received: dict[tuple[str, int, int], list[Call]] = defaultdict(list)
        self.numbers: list[dict[int, int]] = [{} for _ in records]  # by position: place in those

    def run(self) -> str | None:
        ranks = range(len(self.records))
        moved = True
        while moved:
            moved = False
            for rank in ranks:
                while (event := self.front(rank)) is not None and self.can_go_on(rank, event):
                    if isinstance(event, Call) and not event.is_point_to_point:
                        calls = [self.front(member) for member in event.members]
                        reason = disagreement([call for call in calls if isinstance(call, Call)])
                        if reason is not None:
                            return f"{reason}: {self.describe(event.members)}"
                        for member in event.members:
                            self.positions[member] += 1
                    else:
                        if isinstance(event, Call):
                            self.post(rank, event)
                        self.positions[rank] += 1
                    moved = True
        if any(self.front(rank) is not None for rank in ranks):
            waiting = [rank for rank in ranks if self.front(rank) is not None]
            members = {
                member
                for event in map(self.front, waiting)
                for member in (event.members if isinstance(event, Call) else ())
            }
            return f"no rank can go on: {self.describe(sorted({*waiting, *members}))}"
        return self.unpaired()

    def front(self, rank: int) -> Event | None:
        """The next event of a rank; None at the end."""
        record = self.records[rank]
        return record[self.positions[rank]] if self.positions[rank] < len(record) else None

    def can_go_on(self, rank: int, event: Event) -> bool:
        if isinstance(event, Wait):
            return all(self.has_partner(rank, position) for position in event.calls)
        if event.is_point_to_point:
            return True
        fronts = [self.front(member) for member in event.members]
        return all(isinstance(call, Call) and call.group == event.group for call in fronts)

    def post(self, rank: int, call: Call) -> None:
        """A send or receive begins."""
        ours = (self.sent if call.operation == "send" else self.received)[_pair(rank, call)]
        self.numbers[rank][self.positions[rank]] = len(ours)
        ours.append(call)

    def has_partner(self, rank: int, position: int) -> bool:
        call = self.records[rank][position]
        assert isinstance(call, Call)
        theirs = (self.received if call.operation == "send" else self.sent)[_pair(rank, call)]
        return len(theirs) > self.numbers[rank][position]

    def unpaired(self) -> str | None:
        """Sends and receives that nobody waited for, or whose tensors differ."""
        for key in self.sent.keys() | self.received.keys():
            group, sender, receiver = key
            where = f"from rank {sender} to rank {receiver} in group {group}"
            sent, received = self.sent[key], self.received[key]
            if len(sent) != len(received):
                return f"{len(sent)} sends and {len(received)} receives {where}"
            for number, (give, take) in enumerate(zip(sent, received, strict=True)):
                if give.inputs != take.outputs:
                    return f"send {number} {where} is {give.inputs}, received is {take.outputs}"
        return None

    def describe(self, ranks: Sequence[int]) -> str:
        """Where each of some ranks is."""
        return "; ".join(
            f"rank {rank} at event {self.positions[rank]}: {self.front(rank) or 'the end'}"
            for rank in ranks
        )


def _pair(rank: int, call: Call) -> tuple[str, int, int]:
    assert call.peer is not None
    ends = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
    return call.group, *ends


_EQUAL: dict[str, Callable[[Call], object]] = {
    "the operation": lambda call: call.operation,
    "the group's members": lambda call: call.members,
    "the dtype": lambda call: frozenset(dtype for dtype, _ in call.inputs + call.outputs),
    "the reduction": lambda call: call.reduction,
    "the root": lambda call: call.peer,
}


def _all_gather(calls: Sequence[Call]) -> bool:
    """Every member gets one tensor from each, of the shape that it gives."""
    given = tuple(kind for call in calls for kind in call.inputs)
    return all(call.outputs == given for call in calls)


def _reduce_scatter(calls: Sequence[Call]) -> bool:
    gotten = tuple(kind for call in calls for kind in call.outputs)
    return all(call.inputs == gotten for call in calls)


def _gather(calls: Sequence[Call]) -> bool:
    root = calls[0].members.index(calls[0].peer or 0)
    return calls[root].outputs == tuple(kind for call in calls for kind in call.inputs)


def _scatter(calls: Sequence[Call]) -> bool:
    root = calls[0].members.index(calls[0].peer or 0)
    return calls[root].inputs == tuple(kind for call in calls for kind in call.outputs)


def _all_to_all(calls: Sequence[Call]) -> bool:
    """What i sends to j is what j receives from i."""
    size = len(calls)
    if any(len(call.inputs) != size or len(call.outputs) != size for call in calls):
        return False
    return all(calls[i].inputs[j] == calls[j].outputs[i] for i in range(size) for j in range(size))


def _all_to_all_single(calls: Sequence[Call]) -> bool:
    """The same for rows, which have the same width everywhere."""
    widths = {shape[1:] for call in calls for _, shape in call.inputs + call.outputs}
    fits = all(
        sum(splits) == shape[0]
        for call in calls
        for splits, (_, shape) in (
            (call.input_splits, call.inputs[0]),
            (call.output_splits, call.outputs[0]),
        )
    )
    size = len(calls)
    return (
        len(widths) == 1
        and fits
        and all(
            calls[i].input_splits[j] == calls[j].output_splits[i]
            for i in range(size)
            for j in range(size)
        )
    )


# Where members give or get tensors of different shapes.
_PARTS: dict[str, Callable[[Sequence[Call]], bool]] = {
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "gather": _gather,
    "scatter": _scatter,
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
}
