"""Bytes of states by arithmetic, against models that are built and against other arithmetic."""

from __future__ import annotations

import pytest

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.parameters import count_parameters
from moiie_megatron.planning.plans.state_bytes import state_bytes
from moiie_megatron.planning.routing import balanced
from moiie_megatron.selftest.checks.models import tiny_config
from moiie_megatron.simulation.rank import simulate_rank
from tests.unit.planning.traces import rows, shipped

PADDING = 0.02  # of gradient buffers, at these sizes


def tiny(precision: str = "bf16", **parallel: int) -> RunConfig:
    """Four layers of which two have experts; rows of one length, which stages need not tell."""
    config = tiny_config(1, "bf16")
    return config.model_copy(
        update={
            "language": config.language.model_copy(update={"num_layers": 4, "vocab_size": 500}),
            "moe": config.moe.model_copy(update={"layers": "interleaved"}),
            "parallel": config.parallel.model_copy(update={"expert": 1, **parallel}),
            "data": config.data.model_copy(update={"padding": "sequence_length"}),
            "train": config.train.model_copy(
                update={"global_batch_size": 8, "micro_batch_size": 1, "precision": precision}
            ),
        }
    )


@pytest.mark.parametrize(
    ("config", "world", "ranks"),
    [
        (tiny("fp32"), 1, [0]),
        (tiny(tensor=2, expert=2), 4, [0]),
        (tiny(tensor=2, expert=2, expert_tensor=2, pipeline=2), 8, [0, 7]),
    ],
    ids=["fp32", "tensor and expert", "all kinds"],
)
def test_a_rank_that_is_built_has_as_many(config: RunConfig, world: int, ranks: list[int]) -> None:
    stages = state_bytes(config, world)
    for rank in ranks:
        expected = stages[rank // (world // config.parallel.pipeline)]
        workload = rows(config, world)
        built = simulate_rank(
            config, world=world, rank=rank, workload=workload, routing=balanced(config.moe.layout)
        )
        assert built.memory.weights == pytest.approx(expected.weights, rel=PADDING)
        assert built.memory.gradients == pytest.approx(expected.gradients, rel=PADDING)
        assert built.memory.optimizer == pytest.approx(expected.optimizer, rel=PADDING)


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
        (("optimizer.distributed=false",), 48.0),
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
    replicas = 8 // config.parallel.tensor
    assert replicas == 4
    (one,) = state_bytes(config, 8)
    assert one.trained == count_parameters(config).connector
    assert one.optimizer == pytest.approx(one.trained * bytes_per_trained / 4, rel=1e-6)
    assert one.gradients == 4 * one.trained


def test_gradients_in_bf16_take_half() -> None:
    (full,) = state_bytes(shipped("llama3-stage2"), 8)
    (half,) = state_bytes(shipped("llama3-stage2", "ddp.grad_reduce_in_fp32=false"), 8)
    assert half.gradients * 2 == full.gradients
