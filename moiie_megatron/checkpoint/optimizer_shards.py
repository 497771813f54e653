"""The state of Megatron's distributed optimizer, written and read by the ranks that own it.

Every data-parallel rank owns a range of each buffer of parameters, and with it a part of the
fp32 parameters and of Adam's moments.  Of Megatron-Core's own formats, one is bound to a parallel
layout (``dp_reshardable``), and the other gathers the state of a buffer on each rank
(``fully_reshardable``; see docs/checkpoints.md).  Here a rank writes the part that it owns, as
boxes of tensors that have the names and shapes of ``fully_reshardable``, so that any layout reads
them; nothing is gathered or sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor

from moiie_megatron.checkpoint.flat_ranges import boxes_of_view, meta_like
from moiie_megatron.checkpoint.inner_state import begin_state, read_state, take_over

# Megatron-Core's name; it says how tensors are named, not who writes them.
_SHARDING_TYPE: Final = "fully_reshardable"


def is_distributed(optimizer: Any) -> bool:
    """Whether the data-parallel ranks share the state of an optimizer (Megatron's, chained)."""
    return all(hasattr(part, "gbuf_ranges") for part in optimizer.chained_optimizers)


@dataclass(frozen=True)
class OwnedState:
    """The optimizer state that this rank owns.

    Attributes:
        shards: It as shards of tensors, by a unique name; views of ``tensors``.
        tensors: By parameter of each of the chained optimizers, see ``read_state``.
    """

    shards: dict[str, ShardedTensor]
    tensors: list[tuple[Any, dict[torch.nn.Parameter, dict[str, Tensor]]]]

    def take_over(self) -> None:
        """Let the optimizers go on with what was read into the shards."""
        for part, tensors in self.tensors:
            take_over(part, tensors)


def owned_state(optimizer: Any, model_state: Mapping[str, Any]) -> OwnedState:
    """The optimizer state that this rank owns.

    Args:
        optimizer: Megatron's chained optimizer, with its state.
        model_state: The model's sharded state, which says how the parameters are sharded.
    """
    entries = {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    state = OwnedState({}, [])
    for part in optimizer.chained_optimizers:
        tensors = {}
        for parameter, start, stop in owned_ranges(part):
            tensors[parameter] = read_state(part, parameter)
            entry = entries[id(parameter)]
            for shard in shards_of_range(entry, start, stop, tensors[parameter]):
                state.shards[f"{shard.key} {shard.global_offset}"] = shard
        state.tensors.append((part, tensors))
    return state


def without_copies(shards: Mapping[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """What to write of ``OwnedState.shards``: not the state of tied weights on a later stage.

    Its ranges differ from those on the first stage.  Tensor-parallel ranks that replicate a
    parameter own equal ranges of it, so that either may write them.
    """
    return {name: shard for name, shard in shards.items() if shard.replica_id[0] == 0}


def owned_ranges(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """The parameters of which this rank owns a part, and that range of their values.

    Args:
        part: One ``DistributedOptimizer``.
    """
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def shards_of_range(
    entry: ShardedTensor | ShardedTensorFactory, start: int, stop: int, state: Mapping[str, Tensor]
) -> Iterator[ShardedTensor]:
    """A range of a parameter's optimizer state as shards of tensors like the parameter's own.

    Args:
        entry: How the parameter is sharded.
        start, stop: The range of its flattened values.
        state: Flat tensors by name, of ``stop - start`` values each.
    """
    flat = {name: tensor.detach() for name, tensor in state.items()}
    template = replace(entry, data=meta_like(entry.data))
    built = template.build() if isinstance(template, ShardedTensorFactory) else template
    for shard in nested_values({"": built}):
        axes = shard.prepend_axis_num
        before = (0,) * axes
        for box in boxes_of_view(shard.data, start, stop):
            offsets = zip(shard.global_offset, before + box.offsets, strict=True)
            place = tuple(a + b for a, b in offsets)
            for name, tensor in flat.items():
                values = box.view(tensor, start).view((1,) * axes + box.sizes)
                yield replace(
                    shard,
                    key=f"optimizer.state.{name}.{shard.key}",
                    data=values,
                    dtype=values.dtype,
                    local_shape=tuple(values.shape),
                    global_offset=place,
                    axis_fragmentations=None,  # no regular grid
                    replica_id=(*shard.replica_id[:2], 0),
                    prepend_axis_num=0,
                )


def optimizer_settings(optimizer: Any, updates: int) -> dict[Any, Any]:
    """What is no tensor: parameter groups and number of steps, equal on all ranks.

    Args:
        updates: Number of steps so far.
    """
    parts = [part.state_dict() for part in optimizer.chained_optimizers]
    for part in parts:
        part["param_state_sharding_type"] = _SHARDING_TYPE
        groups = part["optimizer"]["param_groups"]
        # The classes that Megatron's hybrid optimizer has in them are code, which no load runs.
        groups[:] = [
            {key: value for key, value in group.items() if not isinstance(value, type)}
            for group in groups
        ]
        for group in groups:
            # Transformer Engine counts steps only where a rank has parameters.
            group.setdefault("step", updates)
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def load_optimizer_settings(optimizer: Any, saved: Mapping[Any, Any], updates: int) -> None:
    """Set the number of steps; afterwards a fresh optimizer has its state, of any values.

    The parameter groups of the checkpoint are not used: everything else in them follows from the
    configuration and the schedule, or belongs to an implementation (torch's ``fused``, Transformer
    Engine's ``bias_correction``), and the checkpoint may come from another one.

    Args:
        saved: From ``optimizer_settings``.
        updates: Number of steps so far, for checkpoints that do not say it.
    """
    first = saved if "optimizer" in saved else saved[0]
    steps = [g["step"] for g in first["optimizer"]["param_groups"] if "step" in g]
    step = int(steps[0]) if steps else updates
    begin_state(optimizer)
    for part in optimizer.chained_optimizers:
        groups = [settings | {"step": step} for settings in _settings(part)]
        with keep_settings(optimizer):
            part.load_state_dict({"optimizer": {"param_groups": groups}})
        for values in part.optimizer.state.values():
            if isinstance(values.get("step"), Tensor):
                # Megatron gives all parameters one tensor, which every update would advance.
                values["step"] = values["step"].clone()


@contextmanager
def keep_settings(optimizer: Any) -> Iterator[None]:
    """Leave parameter groups as they are while a state is loaded, but for the number of steps.

    Megatron-Core 0.16 looks groups up by a key without the learning rate: parts of the model with
    rates of their own would all get the rate of one of them.
    """
    parts = [(part, _settings(part)) for part in optimizer.chained_optimizers]
    yield
    for part, before in parts:
        for group, settings in zip(part.optimizer.param_groups, before, strict=True):
            group.update(settings)


def _settings(part: Any) -> list[dict[str, Any]]:
    without = ("params", "step")
    return [
        {key: value for key, value in group.items() if key not in without}
        for group in part.optimizer.param_groups
    ]
