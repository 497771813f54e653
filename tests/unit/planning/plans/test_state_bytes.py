"""Bytes of states by arithmetic, against models that are built and against other arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moiie_megatron.planning.parameters import count_parameters
from moiie_megatron.planning.plans.extrapolate import simulate_shallow
from moiie_megatron.planning.plans.jobs import Job
from moiie_megatron.planning.plans.state_bytes import state_bytes
from moiie_megatron.planning.routing import balanced
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.selftest.checks.models import tiny_config
from moiie_megatron.simulation.rank import simulate_rank
from tests.unit.planning.traces import rows, shipped

PADDING = 0.01  # of gradient buffers, and counters of routers, at these sizes


def simulated(jobs: Sequence[Job]) -> list[RankTrace]:
    return [
        simulate_rank(
            job.config, world=job.world, rank=job.rank, workload=job.workload, routing=job.routing
        )
        for job in jobs
    ]


def test_a_rank_that_is_built() -> None:
    """It holds what arithmetic says, and does what ranks with fewer layers tell of it."""
    config = tiny_config(1, "bf16")
    degrees = {"tensor": 2, "expert": 2, "expert_tensor": 2}
    changes = {"global_batch_size": 2, "micro_batch_size": 1}
    config = config.model_copy(
        update={
            "language": config.language.model_copy(update={"num_layers": 6, "vocab_size": 500}),
            "moe": config.moe.model_copy(update={"layers": "interleaved"}),
            "parallel": config.parallel.model_copy(update=degrees),
            "train": config.train.model_copy(update=changes),
        }
    )
    job = Job(config, 4, 0, rows(config, 4), balanced(config.moe.layout))
    (built,) = simulated([job])
    (expected,) = state_bytes(config, 4)
    assert built.memory.weights == pytest.approx(expected.weights, rel=PADDING)
    assert built.memory.gradients == pytest.approx(expected.gradients, rel=PADDING)
    assert built.memory.optimizer == pytest.approx(expected.optimizer, rel=PADDING)
    (told,) = simulate_shallow([job], simulated)
    assert {(c.part, c.when): c for c in told.compute if c.part != "optimizer"} == {
        (c.part, c.when): c for c in built.compute if c.part != "optimizer"
    }
    # What the optimizer updates has padding, which is not linear.
    micro_batch = [[t for t in one.transfers if t.per_micro_batch] for one in (told, built)]
    assert micro_batch[0] == micro_batch[1]
    assert told.memory.peak.total == pytest.approx(built.memory.peak.total, rel=PADDING)


def test_all_ranks_together_hold_the_model() -> None:
    config = shipped("llama3-stage2", "parallel.pipeline=2", "parallel.tensor=1")
    total = count_parameters(config).total
    # Per pipeline rank: everything but experts once, and experts in four parts.
    experts = count_parameters(config).experts
    held = sum(stage.parameters for stage in state_bytes(config, 8))
    assert held == total - experts + experts // 4
    # Replicated weights are written once, with 12 bytes of optimizer state where they train.
    written = sum(4 * stage.written for stage in state_bytes(config, 8))
    assert written == pytest.approx(2 * total + 12 * total, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "bytes_per_trained"),
    [
        ((), 12.0),
        (("optimizer.distributed=false",), 96.0),
        (
            (
                "optimizer.megatron.use_precision_aware_optimizer=true",
                "optimizer.megatron.exp_avg_dtype=bf16",
                "optimizer.megatron.exp_avg_sq_dtype=bf16",
            ),
            8.0,
        ),
        (
            (
                "optimizer.megatron.optimizer_cpu_offload=true",
                "optimizer.megatron.optimizer_offload_fraction=0.5",
            ),
            6.0,
        ),
    ],
)
def test_bytes_of_the_optimizer(overrides: tuple[str, ...], bytes_per_trained: float) -> None:
    config = shipped("llama3-stage1", *overrides)
    assert config.parallel.tensor == 1
    (one,) = state_bytes(config, 8)
    assert one.trained == count_parameters(config).connector
    assert one.optimizer == pytest.approx(one.trained * bytes_per_trained / 8, rel=1e-6)
    assert one.gradients == 4 * one.trained


def test_gradients_in_bf16_take_half() -> None:
    (full,) = state_bytes(shipped("llama3-stage2"), 8)
    (half,) = state_bytes(shipped("llama3-stage2", "ddp.grad_reduce_in_fp32=false"), 8)
    assert half.gradients * 2 == full.gradients
