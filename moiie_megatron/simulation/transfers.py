"""Bytes on the wire, from the recorded collectives of a rank."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Final

import torch

from moiie_megatron.evaluation.collective_recorder import Call, CollectiveRecorder, TensorKind
from moiie_megatron.planning.trace import Pass, Transfer
from moiie_megatron.simulation.parts import PartTracker

# Names of process groups, of which the first that fits names a group.
GROUPS: Final = (
    *("tp", "tp_cp", "ep", "expt_tp", "tp_ep", "pp", "dp", "dp_cp", "expt_dp", "embd"),
    *("mp", "tp_ep_pp"),
)
_EQUAL: Final = {"dp_cp": "dp", "tp_cp": "tp"}  # without context parallelism
# What every micro-batch repeats.
_OF_MICRO_BATCHES: Final = ("tp", "ep", "expt_tp", "tp_ep", "pp")


class TransferRecorder(CollectiveRecorder):
    """Records collectives with the pass in which they were called.

    Args:
        groups: Megatron's process groups by name.
        parts: Tells the pass.
    """

    def __init__(self, groups: dict[str, Any], parts: PartTracker) -> None:
        super().__init__()
        self._parts = parts
        self._names = {}
        for name in reversed(GROUPS):
            if groups.get(name) is not None:
                self._names[groups[name].group_name] = _EQUAL.get(name, name)
        self._passes: dict[int, Pass] = {}  # by position of the call

    def _call(self, name: str, original: Any, group: Any, *args: Any, **kwargs: Any) -> Any:
        self._passes[len(self.events)] = self._parts.now()[1]
        return super()._call(name, original, group, *args, **kwargs)

    def result(self) -> tuple[Transfer, ...]:
        """All calls, added up by collective, group and pass."""
        calls: Counter[tuple[str, str, tuple[int, ...], Pass]] = Counter()
        sizes: Counter[tuple[str, str, tuple[int, ...], Pass]] = Counter()
        rank = torch.distributed.get_rank()
        for position, when in self._passes.items():
            call = self.events[position]
            assert isinstance(call, Call)
            if len(call.members) == 1 or call.operation == "barrier":
                continue
            group = "pp" if call.is_point_to_point else self._names.get(call.group, "world")
            key = (call.operation, group, call.members, when)
            calls[key] += 1
            sizes[key] += bytes_sent(call, rank)
        return tuple(
            Transfer(
                *key,
                per_micro_batch=key[1] in _OF_MICRO_BATCHES and key[3] != "update",
                calls=number,
                bytes_sent=sizes[key],
            )
            for key, number in calls.items()
        )


def bytes_sent(call: Call, rank: int) -> int:
    """Bytes that a rank sends to others; reductions and gathers go around in a ring.

    Args:
        rank: In the job; one of the members.
    """
    size = len(call.members)
    given, taken = _nbytes(call.inputs), _nbytes(call.outputs)
    match call.operation:
        case "all_reduce" | "all_reduce_coalesced":
            return 2 * given * (size - 1) // size
        case "reduce_scatter_single" | "reduce_scatter" | "reduce_scatter_single_coalesced":
            return given * (size - 1) // size
        case "all_gather_single" | "all_gather" | "all_gather_single_coalesced":
            return given * (size - 1)
        case "all_to_all_single":
            rows = sum(call.input_splits)
            own = call.input_splits[call.members.index(rank)]
            return given * (rows - own) // rows if rows else 0
        case "recv":
            return 0
        case "broadcast" | "send" | "reduce":
            return given
        case _:
            return max(given, taken)


def _nbytes(tensors: tuple[TensorKind, ...]) -> int:
    return sum(getattr(torch, dtype).itemsize * math.prod(shape) for dtype, shape in tensors)
