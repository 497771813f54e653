"""Record the collectives of this process: which group, which operation, which tensors.

Gloo waits for a rank as long as the timeout allows and copies bytes of any dtype; NCCL hangs or
crashes where the ranks of a group do not call the same collectives in the same order.  The records
of all ranks together (``collective_order.py``) show that without NCCL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Work

TensorKind = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclass(frozen=True)
class Call:
    """A collective or a point-to-point operation of one rank.

    Attributes:
        group: Name of the process group, the same on all members.
        members: Ranks of the job, in the order of the group.
        operation: ``all_reduce``, ``all_to_all_single``, ``send``, ...
        inputs: dtype and shape of what this rank gives.
        outputs: dtype and shape of what it gets.
        reduction: ``SUM``, ``MAX``, ...; empty without one.
        peer: Rank of the job: the root, or the other end of a send or receive.
        input_splits: Rows for each member, in an all-to-all of one tensor.
        output_splits: Rows from each member.
    """

    group: str
    members: tuple[int, ...]
    operation: str
    inputs: tuple[TensorKind, ...] = ()
    outputs: tuple[TensorKind, ...] = ()
    reduction: str = ""
    peer: int | None = None
    input_splits: tuple[int, ...] = ()
    output_splits: tuple[int, ...] = ()

    @property
    def is_point_to_point(self) -> bool:
        return self.operation in ("send", "recv")

    def __str__(self) -> str:
        words = [self.operation, self.reduction, f"in group {self.group} {list(self.members)}"]
        if self.peer is not None:
            words.append(f"{'with' if self.is_point_to_point else 'root'} {self.peer}")
        for name, kinds, splits in (
            ("in", self.inputs, self.input_splits),
            ("out", self.outputs, self.output_splits),
        ):
            words += [name, *(f"{dtype}{list(shape)}" for dtype, shape in kinds)]
            words += [f"split {list(splits)}"] if splits else []
        return " ".join(filter(None, words))


@dataclass(frozen=True)
class Wait:
    """A rank waits until earlier sends and receives are done.

    Attributes:
        calls: Their positions in the record.
    """

    calls: tuple[int, ...]

    def __str__(self) -> str:
        return f"wait for events {list(self.calls)}"


Event = Call | Wait

# Methods of ProcessGroup and the operation that each runs; several are older names.
_OPERATIONS: Final = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce_coalesced",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "allgather": "all_gather",
    "_allgather_base": "all_gather_single",
    "all_gather_single": "all_gather_single",
    "allgather_coalesced": "all_gather_coalesced",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "all_gather_single_coalesced": "all_gather_single_coalesced",
    "gather": "gather",
    "scatter": "scatter",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter_single",
    "reduce_scatter_single": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
    "reduce_scatter_single_coalesced": "reduce_scatter_single_coalesced",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single",
    "all_to_all_single": "all_to_all_single",
    "barrier": "barrier",
    "send": "send",
    "recv": "recv",
}
_IN_PLACE: Final = ("all_reduce", "all_reduce_coalesced", "reduce", "broadcast")


class CollectiveRecorder:
    """While it is entered, records every call of this process, in order.

    The methods of ``torch.distributed.ProcessGroup`` are replaced meanwhile: functions of
    ``torch.distributed``, coalesced or not, end there.  Functional collectives
    (``torch.distributed._functional_collectives``) do not pass Python; Megatron-Core calls none.

    Attributes:
        events: The record, from the first call on.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._originals: list[tuple[type, str, Any]] = []
        self._unfinished: dict[int, tuple[int, ...]] = {}  # by id of the Work: positions
        self._coalesced: dict[str, list[int]] = {}  # by group, while a batch is put together

    def __enter__(self) -> CollectiveRecorder:
        for name in _OPERATIONS:
            if hasattr(dist.ProcessGroup, name):
                self._replace(dist.ProcessGroup, name, functools.partial(self._call, name))
        self._replace(dist.ProcessGroup, "_start_coalescing", self._start_batch)
        self._replace(dist.ProcessGroup, "_end_coalescing", self._end_batch)
        self._replace(Work, "wait", self._wait)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        self._originals.clear()

    def _replace(self, owner: type, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def method(target: Any, *args: Any, **kwargs: Any) -> Any:
            return wrapper(original, target, *args, **kwargs)

        # Not `original`: what getattr returns would not bind its instance again.
        self._originals.append((owner, name, vars(owner)[name]))
        setattr(owner, name, method)

    def _call(self, name: str, original: Any, group: Any, *args: Any, **kwargs: Any) -> Any:
        call = _describe(_OPERATIONS[name], group, [*args, *kwargs.values()])
        position = len(self.events)
        self.events.append(call)
        work = original(group, *args, **kwargs)
        if call.is_point_to_point:
            batch = self._coalesced.get(call.group)
            if batch is not None:
                batch.append(position)
            elif work is None:  # nothing to wait for: it has been waited for
                self.events.append(Wait((position,)))
            else:
                self._unfinished[id(work)] = (position,)
        return work

    def _start_batch(self, original: Any, group: Any, *args: Any) -> Any:
        self._coalesced[group.group_name] = []
        return original(group, *args)

    def _end_batch(self, original: Any, group: Any, *args: Any) -> Any:
        work = original(group, *args)
        positions = tuple(self._coalesced.pop(group.group_name))
        if positions:
            self._unfinished[id(work)] = positions
        return work

    def _wait(self, original: Any, work: Any, *args: Any, **kwargs: Any) -> Any:
        positions = self._unfinished.pop(id(work), None)
        if positions is not None:
            self.events.append(Wait(positions))
        return original(work, *args, **kwargs)


def _describe(operation: str, group: Any, arguments: list[Any]) -> Call:
    """The arguments are tensors (what is received first), then numbers, then options."""
    members = tuple(dist.get_process_group_ranks(group))
    inputs: tuple[TensorKind, ...] = ()
    outputs: tuple[TensorKind, ...] = ()
    if operation == "send":
        inputs = tuple(_kinds(arguments[0]))
    elif operation == "recv":
        outputs = tuple(_kinds(arguments[0]))
    elif operation in _IN_PLACE:
        inputs = outputs = tuple(_kinds(arguments[0]))
    elif operation != "barrier":
        outputs, inputs = (tuple(_kinds(argument)) for argument in arguments[:2])
    fields: dict[str, Any] = {}
    if operation in ("send", "recv"):
        fields["peer"] = members[arguments[1]]
    if operation == "all_to_all_single":
        for name, kinds, splits in (
            ("output_splits", outputs, arguments[2]),
            ("input_splits", inputs, arguments[3]),
        ):
            # No splits: equal ones.
            rows = kinds[0][1][0] // len(members)
            fields[name] = tuple(map(int, splits)) or (rows,) * len(members)
    options: Any = arguments[-1] if arguments else None
    if hasattr(options, "rootRank"):
        fields["peer"] = members[options.rootRank]
    if hasattr(options, "reduceOp"):
        fields["reduction"] = options.reduceOp.op.name
    return Call(group.group_name, members, operation, inputs, outputs, **fields)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an argument: one, a list, or a list of lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)


def _kinds(value: Any) -> Iterator[TensorKind]:
    for tensor in _tensors(value):
        yield str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
