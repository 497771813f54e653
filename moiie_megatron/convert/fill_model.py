"""Fill a model of any parallel layout from full tensors.

The model says what it is made of through ``sharded_state_dict``: name, global shape and offset
of every local part.  So nothing here knows about tensor, pipeline or expert parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from moiie_megatron.families.weight_map import VOCABULARY
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.chunks import ModelPart

# The full tensor of a checkpoint name and, for experts, a logical id; None leaves the model's.
Get = Callable[[str, int | None], Tensor | None]


@torch.no_grad()
def fill_model(model: ModelPart, get: Get) -> list[str]:
    """Copy every parameter's part out of full tensors, in place.

    Full tensors are asked for one at a time and let go before the next, in an order that asks
    for each (name, expert) once.  Call it before an optimizer copies the parameters.

    Args:
        model: This rank's part of the model.
        get: Gives the full tensor of a sharded name and a logical expert id (None where the
            name has no expert axis), or None to leave what the model has.

    Returns:
        The names that were left as they are, sorted.

    Raises:
        UserError: A full tensor of another shape than the model's.
    """
    left: set[str] = set()
    held: tuple[tuple[str, int | None], Tensor | None] | None = None
    for owner, shards in _parts(model):
        for shard in shards:
            wanted = (shard.key, _expert(shard))
            if held is None or held[0] != wanted:
                held = None  # let go of the last full tensor before the next is read
                held = (wanted, get(*wanted))
            full = held[1]
            if full is None:
                left.add(shard.key)
            else:
                _copy(shard, full, model.num_tokens)
        # A factory may have built copies instead of views.
        storage = owner.data.untyped_storage().data_ptr()
        if any(shard.data.untyped_storage().data_ptr() != storage for shard in shards):
            assert isinstance(owner, ShardedTensorFactory)
            owner.data.copy_(owner.merge_fn([shard.data for shard in shards]))
    return sorted(left)


def _parts(
    model: ModelPart,
) -> Iterator[tuple[ShardedTensor | ShardedTensorFactory, list[ShardedTensor]]]:
    """Every parameter's entry and the shards that it stands for."""
    # Layers under their own numbers also where all are alike (a dense model), so that one name
    # is one tensor.
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": model.groups.dp_cp}
    for entry in nested_values(model.sharded_state_dict(metadata=metadata)):
        if isinstance(entry, ShardedTensorFactory):
            yield entry, list(nested_values(entry.build()))
        elif isinstance(entry, ShardedTensor):
            yield entry, [entry]


def _expert(shard: ShardedTensor) -> int | None:
    """The logical expert id: the one axis that our checkpoints put in front of a weight's own."""
    assert shard.prepend_axis_num <= 1, shard
    return shard.global_offset[0] if shard.prepend_axis_num else None


def _copy(shard: ShardedTensor, full: Tensor, num_tokens: int) -> None:
    slices = _slices(shard, full, num_tokens)
    part = full[slices]
    if part.shape == shard.data.shape:
        shard.data.copy_(part)
    else:  # the end of the vocabulary in a padded table
        shard.data.zero_()
        shard.data[: len(part)].copy_(part)


def _slices(shard: ShardedTensor, full: Tensor, num_tokens: int) -> tuple[slice, ...]:
    """Where this shard lies in the full tensor, which may end before it (padded vocabularies)."""
    shape = shard.global_shape[shard.prepend_axis_num :]
    if shard.key in VOCABULARY and full.shape[0] == num_tokens:
        shape = (num_tokens, *shape[1:])
    if tuple(full.shape) != tuple(shape):
        raise UserError(
            f"{shard.key} has shape {tuple(full.shape)} in the source and {tuple(shape)} in the "
            "model: use weights of the same architecture."
        )
    offsets = shard.global_offset[shard.prepend_axis_num :]
    return tuple(
        slice(start, start + size) for start, size in zip(offsets, shard.local_shape, strict=True)
    )
