"""Loads weights into a fresh model; a MoE model may read a dense checkpoint (upcycling).

Upcycling: every rank reads the dense FFN of a layer into each of its experts of that layer, and
routers keep their random initialisation (paper, section 3).  Since top-k probabilities are
renormalised, the upcycled model computes what its dense parent does, up to rounding, whatever
its routers choose.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moiie_megatron.checkpoint.save_load import load_common, read_sharded, sharding_metadata
from moiie_megatron.checkpoint.stored_state import read_stored_tensors
from moiie_megatron.checkpoint.verify_files import verify_files
from moiie_megatron.families.weight_map import CONNECTOR, EXPERTS, ROUTER, VOCABULARY, dense_name
from moiie_megatron.layout.vocabulary import is_padded_vocab
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.chunks import ModelPart


def load_weights(
    checkpoint: Path, context: ParallelContext, model: ModelPart, *, new_connector: bool = False
) -> None:
    """Load the weights of a checkpoint of any stage and parallel layout into a fresh model.

    A layer that has experts in the model and a dense FFN in the checkpoint is upcycled.

    Args:
        checkpoint: Its directory.
        new_connector: The connector keeps its fresh weights.

    Raises:
        UserError: There is no checkpoint, a file of it is damaged, or its tensors do not fit the
            model.
    """
    load_common(checkpoint)
    verify_files(checkpoint, context)
    stored = read_stored_tensors(checkpoint).state_dict_metadata
    present = {
        name: tuple(entry.size)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    # Each distinct shard is read once: all local experts of a layer read the same dense one.
    wanted: dict[str, ShardedTensor] = {}
    entries: list[tuple[Any, list[str]]] = []
    for entry in _entries(model, context):
        names = []
        for shard in _shards(entry):
            if ROUTER in shard.key and shard.key not in present:
                continue  # a fresh router
            if new_connector and shard.key.startswith(CONNECTOR):
                continue
            source = shard if shard.key in present else _dense_shard(shard)
            _check(source, present, checkpoint, model)
            name = f"{source.key}@{source.global_offset}"
            # Reading changes the shape of what it is given: the model's own entry keeps its data.
            wanted.setdefault(name, replace(source))
            names.append(name)
        if names:
            entries.append((entry, names))
    # Ranks that hold the same expert read the same dense shard: no exclusive owners here.
    loaded = read_sharded(checkpoint, dict(wanted), context, validate_access_integrity=False)
    with torch.no_grad():
        for entry, names in entries:
            pieces = [loaded[name] for name in names]
            value = entry.merge_fn(pieces) if isinstance(entry, ShardedTensorFactory) else pieces[0]
            entry.data.copy_(value)


def _entries(
    model: ModelPart, context: ParallelContext
) -> list[ShardedTensor | ShardedTensorFactory]:
    """One entry per parameter; the extra state of Transformer Engine modules is not loaded."""
    state = model.sharded_state_dict(metadata=sharding_metadata(context))
    return [v for v in state.values() if isinstance(v, ShardedTensor | ShardedTensorFactory)]


def _shards(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    return entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]


def _dense_shard(shard: ShardedTensor) -> ShardedTensor:
    """The same shard of the dense tensor: without the expert axis, which comes first."""
    name = dense_name(shard.key)
    if EXPERTS not in shard.key:
        return replace(shard, key=name)
    assert shard.prepend_axis_num == 1, shard
    return replace(
        shard,
        key=name,
        data=_fresh(shard),
        global_shape=shard.global_shape[1:],
        global_offset=shard.global_offset[1:],
        axis_fragmentations=shard.axis_fragmentations[1:],
        prepend_axis_num=0,
    )


def _fresh(shard: ShardedTensor) -> Tensor:
    return torch.empty(shard.local_shape, dtype=shard.dtype, device=shard.data.device)


def _check(
    shard: ShardedTensor,
    present: dict[str, tuple[int, ...]],
    checkpoint: Path,
    model: ModelPart,
) -> None:
    if shard.key not in present:
        raise UserError(
            f"The checkpoint {checkpoint} has no tensor {shard.key}: it belongs to another model."
        )
    have, want = present[shard.key], tuple(shard.global_shape)
    if (
        # Rows that pad the vocabulary may be more or fewer: Megatron allows for that.
        shard.key in VOCABULARY
        and have[1:] == want[1:]
        and is_padded_vocab(have[0], model.num_tokens)
    ):
        return
    if have != want:
        raise UserError(
            f"{shard.key} has shape {have} in the checkpoint {checkpoint} but this run wants "
            f"{want}: use the same language, vision and moe sections."
        )
