"""The state of a run as a distributed checkpoint, written and read in any parallel layout.

A run's checkpoints are directories ``OUTPUT/checkpoints/step_0000100``; the file ``latest`` beside
them names the newest complete one.  Each is a Megatron ``torch_dist`` checkpoint that also holds
the resolved configuration and the tokenizer, so that it can be used on its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from moiie_megatron.checkpoint.directory import CONFIG_FILE, FORMAT_VERSION
from moiie_megatron.checkpoint.inner_state import begin_state
from moiie_megatron.checkpoint.older_progress import renamed_counters
from moiie_megatron.checkpoint.optimizer_shards import (
    is_distributed,
    keep_settings,
    load_optimizer_settings,
    optimizer_settings,
    owned_state,
    without_copies,
)
from moiie_megatron.checkpoint.parallel_io import begin_save, load_strategy
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.stored_state import read_common, read_stored_tensors
from moiie_megatron.checkpoint.verify_files import verify_files
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.patches.dist_checkpointing import (
    add_dummy_step_state,
    distinguish_parameter_groups,
    remove_dummy_step_state,
)
from moiie_megatron.mcore.patches.dist_pickles import refuse_code_in_checkpoints
from moiie_megatron.utils.errors import UserError


def sharding_metadata(context: ParallelContext) -> dict[str, Any]:
    """How Megatron shards the state: one name per layer, so that every layout can read it."""
    return {
        "dp_cp_group": context.groups.dp_cp,
        # MoE and dense layers differ, and a dense checkpoint must have the same names.
        "non_homogeneous_layers": True,
        # The default type cannot change TP, PP or EP.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def request_save(
    checkpoint: Path, context: ParallelContext, parts: dict[str, Any], progress: Progress
) -> AsyncRequest:
    """The request that saves a run (what to write, what to do then); every rank calls this.

    Args:
        checkpoint: The directory to write; an existing one is removed.
        parts: ``model``, ``optimizer`` and ``scheduler``; ``stream`` where the data loader has a
            state; ``counters``, a dictionary of further objects with ``state_dict`` and
            ``load_state_dict``, whose state is equal on all ranks.
    """
    metadata = sharding_metadata(context)
    state = _sharded_state(parts, context, metadata)
    with add_dummy_step_state(parts["optimizer"], progress.updates):
        state |= _optimizer_state(parts["optimizer"], state["model"], metadata, progress.updates)
    state["scheduler"] = parts["scheduler"].state_dict()
    state["progress"] = progress.to_state()
    state["counters"] = {name: part.state_dict() for name, part in _counters(parts)}
    state["format_version"] = FORMAT_VERSION
    state["world_size"] = context.size
    if context.rank == 0:
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir(parents=True)
    dist.barrier()
    stored = {k: v for k, v in metadata.items() if k != "dp_cp_group"}
    return begin_save(state, checkpoint, stored)


def load_checkpoint(checkpoint: Path, context: ParallelContext, parts: dict[str, Any]) -> None:
    """Load weights, optimizer, schedule and RNG into ``parts``, from any parallel layout.

    Raises:
        UserError: There is no checkpoint, a file of it is damaged, it is of a newer version, or
            does not fit the model.
    """
    distinguish_parameter_groups()
    metadata = sharding_metadata(context)
    common = load_common(checkpoint)
    verify_files(checkpoint, context)
    state = _sharded_state(parts, context, metadata)
    if common.get("world_size") != context.size:
        del state["rng"]  # one state per rank, meaningless for another number of ranks
    _keep_objects(state["model"])
    optimizer, owned = parts["optimizer"], None
    updates = Progress.from_state(common["progress"]).updates
    if is_distributed(optimizer):
        load_optimizer_settings(optimizer, common["optimizer"], updates)
        owned = owned_state(optimizer, state["model"])
        # The shards are views, and read in place; what is handed over may be changed.
        state["optimizer_shards"] = {name: replace(shard) for name, shard in owned.shards.items()}
    else:
        # Without an update there are no moments, neither there nor here.
        state["optimizer"] = optimizer.sharded_state_dict(
            state["model"], is_loading=updates > 0, metadata=metadata
        )
    loaded = read_sharded(checkpoint, state, context)
    parts["model"].load_state_dict(loaded["model"])
    if owned is None:
        with keep_settings(optimizer):
            optimizer.load_state_dict(loaded["optimizer"])
        remove_dummy_step_state(optimizer)
    else:
        for name, shard in owned.shards.items():
            if loaded["optimizer_shards"][name].data_ptr() != shard.data.data_ptr():
                shard.data.copy_(loaded["optimizer_shards"][name])
        owned.take_over()
    parts["scheduler"].load_state_dict(loaded["scheduler"])
    if "stream" in parts:
        parts["stream"].restore(loaded["stream"])
    if "rng" in loaded:
        _set_rng(loaded["rng"], context)
    counters = renamed_counters(common.get("counters", {}))
    for name, part in _counters(parts):
        if name in counters:
            part.load_state_dict(counters[name])


def _keep_objects(model_state: dict[str, Any]) -> None:
    """Ask for tensors alone: objects of the model stay as they are.

    Transformer Engine's modules have an extra state.  It is empty but with FP8, which the
    configuration refuses, and Transformer Engine unpickles it.
    """
    for name, entry in model_state.items():
        if isinstance(entry, ShardedObject):
            model_state[name] = LocalNonpersistentObject(entry.data)


def load_common(checkpoint: Path) -> dict[str, Any]:
    """``read_common``; from then on Megatron-Core reads checkpoints without running code in them.

    Raises:
        UserError: See ``read_common``.
    """
    refuse_code_in_checkpoints()
    return read_common(checkpoint)


def read_sharded(
    checkpoint: Path, state: dict[str, Any], context: ParallelContext, **options: Any
) -> dict[str, Any]:
    """``dist_checkpointing.load`` by all ranks together, with its errors as UserError.

    Raises:
        UserError: A tensor is missing, or its shape is not that of the model.
    """
    try:
        return dist_checkpointing.load(state, str(checkpoint), load_strategy(context), **options)
    except (Exception, CheckpointException) as error:  # the readers raise many types
        read_stored_tensors(checkpoint)  # torch does not tell why it could not read it
        # Torch wraps the ranks' errors in a BaseException whose own text only counts them.
        causes = error.failures.values() if isinstance(error, CheckpointException) else ()
        cause = next((inner for inner, _ in causes), error)
        raise UserError(
            f"The checkpoint {checkpoint} does not fit this run ({_first_line(cause)}): compare "
            f"its {CONFIG_FILE} with the configuration."
        ) from error


def _sharded_state(
    parts: dict[str, Any], context: ParallelContext, metadata: dict[str, Any]
) -> dict[str, Any]:
    state = {
        "model": parts["model"].sharded_state_dict(metadata=metadata),
        "rng": ShardedObject("rng", _rng(context), (context.size,), (context.rank,)),
    }
    if "stream" in parts:
        # The same on all tensor- and pipeline-parallel peers of a data-parallel rank.
        peer = (context.groups.tp.rank(), context.groups.pp.rank())
        state["stream"] = ShardedObject(
            "stream", parts["stream"].tensor(), (context.dp_size,), (context.dp_rank,), peer
        )
    return state


def _optimizer_state(
    optimizer: Any, model_state: dict[str, Any], metadata: dict[str, Any], updates: int
) -> dict[str, Any]:
    if not is_distributed(optimizer):
        return {"optimizer": optimizer.sharded_state_dict(model_state, metadata=metadata)}
    begin_state(optimizer)
    state = {"optimizer": optimizer_settings(optimizer, updates)}
    # Without one (nothing is trained on this pipeline stage) there is nothing to write.
    if shards := without_copies(owned_state(optimizer, model_state).shards):
        state["optimizer_shards"] = shards
    return state


def _counters(parts: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return parts.get("counters", {}).items()


def _rng(context: ParallelContext) -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if context.device.is_cuda:
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, Any], context: ParallelContext) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if context.device.is_cuda and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _first_line(error: BaseException, limit: int = 200) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit].rstrip(".:")
