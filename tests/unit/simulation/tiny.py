"""Simulations of a tiny model with experts in every second of four layers."""

from __future__ import annotations

from functools import cache
from typing import Any

from moiie_megatron.config.schema import MoEConfig, ParallelConfig, RunConfig
from moiie_megatron.planning.routing import balanced
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload
from moiie_megatron.simulation.rank import simulate_rank
from tests.parity.tiny import language, run_config

WORLD = 4
# Two rows of 32 tokens, 12 of them padding; an image is 16 tokens.
ROWS = ((SampleShape(32, 1, 8),), (SampleShape(20, 0, 8),))
WORKLOAD = Workload((MicroBatchShape(ROWS, 32),), "two rows")


def tiny_config(**parallel: Any) -> RunConfig:
    """A run in bf16 on GPUs whose parts all train."""
    moe = MoEConfig(num_vision_experts=1, num_shared_experts=2, num_text_experts=1)
    config = run_config(language("llama"), moe, parallel=ParallelConfig(**parallel))
    rates = dict.fromkeys(("vision", "connector", "language", "moe"), 1e-3)
    stage = config.stage.model_copy(update={"learning_rates": rates})
    train = config.train.model_copy(update={"device": "cuda", "precision": "bf16"})
    return config.model_copy(update={"stage": stage, "train": train})


def simulate(config: RunConfig, rank: int = 0) -> RankTrace:
    """A step of one of four ranks, with balanced routing."""
    routing = balanced(config.moe.layout)
    return simulate_rank(config, world=WORLD, rank=rank, workload=WORKLOAD, routing=routing)


@cache
def simulated(rank: int) -> RankTrace:
    """A rank of the layout with tensor and expert parallelism."""
    return simulate(tiny_config(tensor=2, expert=2), rank)
