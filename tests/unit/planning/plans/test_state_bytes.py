"""Bytes of states by arithmetic, against models that are built and against other arithmetic."""

from __future__ import annotations

import pytest

from moiie_megatron.planning.parameters import count_parameters
from moiie_megatron.planning.plans.state_bytes import state_bytes
from moiie_megatron.planning.routing import balanced
from moiie_megatron.selftest.checks.models import tiny_config
from moiie_megatron.simulation.rank import simulate_rank
from tests.unit.planning.traces import rows, shipped

PADDING = 0.01  # of gradient buffers, and counters of routers, at these sizes


def test_a_rank_that_is_built_has_as_many() -> None:
    """In a layout with all kinds of parallelism: the first stage, with part of everything."""
    config = tiny_config(1, "bf16")
    degrees = {"tensor": 2, "expert": 2, "expert_tensor": 2, "pipeline": 2}
    config = config.model_copy(
        update={
            "language": config.language.model_copy(update={"num_layers": 4, "vocab_size": 500}),
            "moe": config.moe.model_copy(update={"layers": "interleaved"}),
            "parallel": config.parallel.model_copy(update=degrees),
            "data": config.data.model_copy(update={"padding": "sequence_length"}),
            "train": config.train.model_copy(
                update={"global_batch_size": 2, "micro_batch_size": 1}
            ),
        }
    )
    workload, routing = rows(config, 8), balanced(config.moe.layout)
    built = simulate_rank(config, world=8, rank=0, workload=workload, routing=routing).memory
    expected = state_bytes(config, 8)[0]
    assert built.weights == pytest.approx(expected.weights, rel=PADDING)
    assert built.gradients == pytest.approx(expected.gradients, rel=PADDING)
    assert built.optimizer == pytest.approx(expected.optimizer, rel=PADDING)


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
