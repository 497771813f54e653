"""Record one optimizer step as full logical tensors, to compare parallel layouts.

Every rank describes its parameters and gradients as shards of the distributed checkpoint; rank 0
assembles the full tensors.  Replicas of a shard must be equal on all ranks that hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from moiie_megatron.checkpoint.save_load import sharding_metadata
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.fill_model import fill_model
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.routing_stats.counters import RoutingCounters
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import count_tokens, evaluate_loss, run_schedule
from moiie_megatron.vlm.build import build_chunks
from moiie_megatron.vlm.chunks import ModelChunks

# A shard: name of its tensor, full shape, offset of the shard in it, and the values.
_Shard = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


class ShardMismatch(Exception):
    """Replicas of a shard differ between ranks, or a part of a tensor is on no rank."""


def record_step(
    config: RunConfig,
    context: ParallelContext,
    batches: list[Batch],
    weights: Callable[[str, int | None], Tensor | None] | None,
) -> dict[str, Tensor] | None:
    """Record one step from given weights; every rank calls this.

    Args:
        config: The run; its optimizer is used without the distributed optimizer's sharding.
        context: This process's ranks and groups.
        batches: This rank's micro-batches of the global batch.
        weights: Full tensors by logical name (``convert/fill_model.py``); None keeps the initial
            values.

    Returns:
        On rank 0: ``start/NAME``, ``grad/NAME`` (after all reductions), ``next/NAME`` (after the
        optimizer) by logical tensor name, and ``loss``, ``eval_loss``, ``aux``; elsewhere None.

    Raises:
        ShardMismatch: Replicas of a tensor differ between ranks.
    """
    # With the distributed optimizer a rank would hold shards of the gradients only; fields of
    # Megatron-Core's that may depend on it are left out too.
    optimizer = config.optimizer.model_copy(update={"distributed": False, "megatron": {}})
    config = config.model_copy(update={"optimizer": optimizer, "ddp": {}})
    model = build_chunks(config, context)
    if weights is not None:
        fill_model(model, weights)
    record = _gather("start", _shards(model, context, lambda parameter: parameter.data), context)
    eval_loss = evaluate_loss(config, context, model, batches)
    train_state = prepare_training(config, context, model, steps=10)
    labels = count_tokens(batches, context).labels
    scale = len(batches) * context.dp_size / max(labels, 1)
    micro_batch_losses = run_schedule(config, context, train_state.ddp, batches, loss_scale=scale)
    loss = micro_batch_losses.sum() / max(labels, 1)
    for group in (context.groups.dp, context.groups.pp):
        dist.all_reduce(loss, group=group)
    counters = RoutingCounters(config, context, model)
    counters.count_step(len(batches) * context.dp_size)
    aux = counters.losses().aux
    record |= _gather("grad", _shards(model, context, _main_grad), context)
    train_state.optimizer.step_if(lambda: True)
    record |= _gather("next", _shards(model, context, lambda parameter: parameter.data), context)
    record |= {
        "loss": loss.cpu(),
        "eval_loss": torch.tensor(eval_loss),
        "aux": torch.tensor(list(aux.values())),
    }
    return record if context.rank == 0 else None


def _main_grad(parameter: Any) -> Tensor | None:
    """The attribute that Megatron adds to parameters that train."""
    return parameter.main_grad if parameter.requires_grad else None


def _shards(
    model: ModelChunks, context: ParallelContext, read: Callable[[Tensor], Tensor | None]
) -> Iterator[_Shard]:
    """This rank's shard of every tensor; ``read`` returns the values of a parameter."""
    for entry in model.sharded_state_dict(metadata=sharding_metadata(context)).values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue  # extra state of Transformer Engine modules
        values = read(entry.data)
        if values is None:
            continue
        if isinstance(entry, ShardedTensorFactory):
            shards = entry.build_fn(entry.key, values, entry.replica_id, None)
        else:
            entry.data = values
            shards = [entry]
        for shard in shards:
            part = shard.data.detach().float().cpu().clone()
            part = part.reshape((1,) * shard.prepend_axis_num + tuple(part.shape))
            yield shard.key, tuple(shard.global_shape), tuple(shard.global_offset), part


def _gather(kind: str, shards: Iterator[_Shard], context: ParallelContext) -> dict[str, Any]:
    """Full tensors on rank 0, an empty dictionary on the other ranks.

    Raises:
        ShardMismatch: On all ranks: two ranks hold different values of the same shard.
    """
    received: list[list[_Shard]] | None = [[]] * context.size if context.rank == 0 else None
    dist.gather_object(list(shards), received)
    full: dict[str, Tensor] = {}
    problem = [""]
    try:
        full = _assemble(kind, received or [])
    except ShardMismatch as error:
        problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise ShardMismatch(problem[0])
    return full


def _assemble(kind: str, received: list[list[_Shard]]) -> dict[str, Tensor]:
    """Full tensors from the shards of all ranks.

    Raises:
        ShardMismatch: Two ranks hold different values of a shard, or a part is missing.
    """
    full: dict[str, Tensor] = {}
    for rank_shards in received:
        for name, shape, offset, part in rank_shards:
            tensor = full.setdefault(f"{kind}/{name}", torch.full(shape, float("nan")))
            region = tensor[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))]
            seen = ~region.isnan()
            difference = (region - part)[seen].abs().max() if seen.any() else torch.zeros(())
            if difference > 1e-5 * part.abs().max():
                raise ShardMismatch(
                    f"{kind} of {name} differs by {float(difference):.2e} between ranks that "
                    "hold the same shard."
                )
            region.copy_(part)
    for name, tensor in full.items():
        if tensor.isnan().any():
            raise ShardMismatch(f"{kind} of {name} is incomplete on all ranks together, or is NaN.")
    return full


def differences(
    record: dict[str, Tensor], reference: dict[str, Tensor]
) -> dict[str, tuple[float, str]]:
    """Largest relative difference of each kind, and the tensor that has it.

    A difference is relative to the largest absolute value of its tensor (of its update, for
    ``next``), or to 1e-4 of the largest of its kind if that is more: some gradients are zero up
    to rounding (a bias of the keys does not change the softmax), so that the ratio of two
    rounding errors must not count.

    A value that is not a number in either record is an infinite difference.

    Returns:
        ``loss``, ``eval_loss``, ``aux`` (of models with experts), ``grad`` and ``next``.

    Raises:
        ValueError: The records hold different tensors.
    """
    if record.keys() != reference.keys():
        odd = sorted(record.keys() ^ reference.keys())
        raise ValueError(f"The layouts have different tensors, such as {', '.join(odd[:5])}.")
    errors: dict[str, list[tuple[float, float, str]]] = {}
    for name, want in reference.items():
        kind = name.split("/")[0]
        if kind == "start" or not want.numel():  # a dense model has no balance losses
            continue
        size = want
        if kind == "next":
            size = want - reference["start" + name.removeprefix("next")]
        # A weight is rounded after its update, which may be far smaller than the weight.
        rounding = torch.finfo(want.dtype).eps * want.abs() if kind == "next" else 0.0
        error = ((record[name] - want).abs() - rounding).clamp(min=0.0).max()
        # max() below would pass over a NaN.
        error = torch.nan_to_num(error, nan=math.inf)
        largest = torch.nan_to_num(size).abs().max()
        errors.setdefault(kind, []).append((float(error), float(largest), name))
    worst = {}
    for kind, found in errors.items():
        floor = max(1e-4 * max(size for _, size, _ in found), 1e-30)
        worst[kind] = max((error / max(size, floor), name) for error, size, name in found)
    return worst
