"""One rank of a run of any size, simulated on this machine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.routing import RoutingAssumption
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.planning.workload import Workload
from moiie_megatron.simulation.batches import make_batch
from moiie_megatron.simulation.fake_values import fake_tensors
from moiie_megatron.simulation.fake_world import fake_world
from moiie_megatron.simulation.on_gpus import as_on_gpus, gpu_kernels
from moiie_megatron.simulation.routing import SimulatedRouting
from moiie_megatron.simulation.states import make_moments
from moiie_megatron.simulation.substitutes import building, stepping
from moiie_megatron.simulation.trace_step import trace_step
from moiie_megatron.training.state import prepare_training
from moiie_megatron.vlm.build import build_chunks


def simulate_rank(
    config: RunConfig, *, world: int, rank: int, workload: Workload, routing: RoutingAssumption
) -> RankTrace:
    """Build a rank of any world and let it run one step, all on fake tensors.

    Args:
        config: The run; its paths are not looked at.  ``train.device`` says whether it is taken
            as one on GPUs.
        world: Number of ranks of the job.
        rank: The rank that is simulated.
        workload: Micro-batches, taken to be the same on all data-parallel ranks.
        routing: Where tokens go, on all ranks alike.
    """
    on_gpus = config.train.device != "cpu"
    if on_gpus:
        config = as_on_gpus(config)
    batches = [make_batch(config, shape) for shape in workload.micro_batches]
    simulated = SimulatedRouting(routing, config.placement)
    with fake_world(config, rank, world) as context, fake_tensors() as values:
        with building():
            state = prepare_training(config, context, build_chunks(config, context), steps=10)
            make_moments(state)
        state.model.train()
        batches = [
            replace(batch, images=torch.empty(batch.images.shape, dtype=torch.uint8))
            for batch in batches
        ]
        with (
            stepping(values, _hidden_shapes(config, workload)),
            gpu_kernels() if on_gpus else nullcontext(),
        ):
            return trace_step(config, context, state, batches, simulated)


def _hidden_shapes(config: RunConfig, workload: Workload) -> list[tuple[int, int, int]]:
    """Of the hidden states ``(s, b, h)`` of every micro-batch on one rank."""
    split = config.parallel.tensor if config.parallel.sequence_parallel else 1
    return [
        (batch.length // split, len(batch.rows), config.language.hidden_size)
        for batch in workload.micro_batches
    ]
