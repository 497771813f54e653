"""One rank of a run of any size, simulated on this machine."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.planning.workload import Workload
from moiie_megatron.simulation.batches import make_batch
from moiie_megatron.simulation.fake_values import fake_tensors
from moiie_megatron.simulation.fake_world import fake_world
from moiie_megatron.simulation.states import make_moments, state_bytes
from moiie_megatron.simulation.substitutes import Router, building, replaced, stepping
from moiie_megatron.simulation.watch import Watch
from moiie_megatron.training import step as training_step
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.vlm.build import build_chunks


def simulate_rank(
    config: RunConfig, *, world: int, rank: int, workload: Workload, route: Router
) -> RankTrace:
    batches = [make_batch(config, shape) for shape in workload.micro_batches]
    with fake_world(config, rank, world) as context, fake_tensors() as values:
        with building():
            state = prepare_training(config, context, build_chunks(config, context), steps=10)
            make_moments(state)
        state.model.train()
        batches = [replace(batch, images=torch.empty(batch.images.shape, dtype=torch.uint8)) for batch in batches]
        with stepping(values, route):
            return trace_step(config, context, state, batches)


def trace_step(
    config: RunConfig, context: ParallelContext, state: TrainState, batches: list[Batch]
) -> RankTrace:
    """Run one step of training, fake or real, and describe what this rank did.

    Args:
        state: After ``make_moments`` or a first step.
    """
    watch = Watch(state.model, named_groups(context))
    between = watch.parts.between
    mconfig = state.model[0].config
    with ExitStack() as stack:
        for owner, name, part, when in (
            (training_step, "run_schedule", "other", "forward"),
            # Called by the schedule, once in a step.
            (mconfig, "finalize_model_grads_func", "optimizer", "update"),
        ):
            original = getattr(owner, name)
            watched = between(part, when)(original)
            stack.enter_context(replaced(owner, **{name: watched}))
        with watch:
            training_step.train_step(config, context, state, batches)
    return RankTrace(
        rank=context.rank,
        world=context.size,
        stage=context.groups.pp.rank(),
        micro_batches=len(batches),
        compute=watch.compute(),
        transfers=watch.transfers(),
        memory=watch.memory_trace(*state_bytes(state)),
        expert_rows={},
    )


def named_groups(context: ParallelContext) -> dict[str, Any]:
    """Megatron's process groups by their names."""
    found = {
        field.name: getattr(context.groups, field.name, None)
        for field in dataclasses.fields(context.groups)
    }
    return {name: group for name, group in found.items() if isinstance(group, dist.ProcessGroup)}
