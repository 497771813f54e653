"""One step of training, described by what this rank did in it."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.simulation.routed_layers import routed_by
from moiie_megatron.simulation.routing import SimulatedRouting
from moiie_megatron.simulation.states import state_bytes
from moiie_megatron.simulation.watch import Watch
from moiie_megatron.training import step as training_step
from moiie_megatron.training.state import TrainState
from moiie_megatron.utils.replaced import replaced


def trace_step(
    config: RunConfig,
    context: ParallelContext,
    state: TrainState,
    batches: list[Batch],
    routing: SimulatedRouting | None,
) -> RankTrace:
    """Run one step of training, fake or real, and describe what this rank did.

    Args:
        state: After ``make_moments`` or a first step.
        routing: None leaves the choice to the routers, in a real step.
    """
    watch = Watch(state.model, named_groups(context))
    mconfig: Any = state.model[0].config
    schedule = watch.parts.between("other", "forward")(training_step.run_schedule)
    # Called by the schedule, once in a step.
    finalize = watch.parts.between("optimizer", "update")(mconfig.finalize_model_grads_func)
    with ExitStack() as stack:
        stack.enter_context(replaced(training_step, run_schedule=schedule))
        stack.enter_context(replaced(mconfig, finalize_model_grads_func=finalize))
        if routing is not None:
            stack.enter_context(routed_by(routing, context.groups))
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
        expert_rows=watch.expert_rows,
    )


def named_groups(context: ParallelContext) -> dict[str, Any]:
    """Megatron's process groups by their names."""
    found = {
        field.name: getattr(context.groups, field.name, None)
        for field in dataclasses.fields(context.groups)
    }
    return {name: group for name, group in found.items() if isinstance(group, dist.ProcessGroup)}
