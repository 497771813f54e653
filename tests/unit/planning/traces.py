"""Traces and simulations made by hand, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moiie_megatron.cli.plan_inputs import read_unset_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.layout.stages import layers_of_ranks
from moiie_megatron.planning.plans.jobs import Inputs, Job
from moiie_megatron.planning.plans.state_bytes import state_bytes
from moiie_megatron.planning.routing import balanced
from moiie_megatron.planning.trace import (
    Compute,
    MemorySample,
    MemoryTrace,
    RankTrace,
    Transfer,
)
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload

CONFIGS = Path(__file__).resolve().parents[3] / "examples" / "configs"
MIB = 1 << 20


def shipped(name: str, *overrides: str) -> RunConfig:
    """A configuration of ``examples/configs``, whose variables are not set."""
    return read_unset_config(CONFIGS / f"{name}.yaml", overrides)


def compute(part: Any = "dense_ffn", when: Any = "forward", **numbers: int) -> Compute:
    values = {"flops": 0, "bytes": 0, "matmul_bytes": 0, "kernels": 0} | numbers
    return Compute(part=part, when=when, **values)


def transfer(
    group: str, members: Sequence[int], operation: str = "all_reduce", **values: Any
) -> Transfer:
    given = {"when": "forward", "per_micro_batch": True, "calls": 1, "bytes_sent": 0} | values
    return Transfer(operation=operation, group=group, members=tuple(members), **given)


def memory(activations: int = 0, **states: int) -> MemoryTrace:
    peak = MemorySample("backward", 0, {"attention": activations})
    values = {"weights": 0, "gradients": 0, "optimizer": 0} | states
    return MemoryTrace(peak=peak, timeline=(peak,), **values)


def trace(*parts: Compute | Transfer, **values: Any) -> RankTrace:
    """The only rank of a job, with one micro-batch."""
    given = {"rank": 0, "world": 1, "stage": 0, "micro_batches": 1, "memory": memory()} | values
    return RankTrace(
        compute=tuple(part for part in parts if isinstance(part, Compute)),
        transfers=tuple(part for part in parts if isinstance(part, Transfer)),
        expert_rows={},
        **given,
    )


def rows(config: RunConfig, world: int) -> Workload:
    """Rows of full length with one image each, as many as a rank gets in a step."""
    size, length = config.micro_batch_shape
    replicas = world // (config.parallel.tensor * config.parallel.pipeline)
    count = config.train.global_batch_size // (replicas * config.train.micro_batch_size)
    shape = MicroBatchShape(((SampleShape(length, 1, length // 4),),) * size, length)
    return Workload((shape,) * count, "rows of full length")


def inputs() -> Inputs:
    def workloads(config: RunConfig, world: int) -> tuple[Workload, Workload]:
        workload = rows(config, world)
        return workload, workload

    return Inputs(workloads, lambda config, _: balanced(config.moe.layout))


class MadeSimulation:
    """Answers jobs with traces whose numbers are linear in the layers of a rank.

    A layer has 1 TFLOP per pass and keeps 400 MiB of activations per row, or 20 MiB where all is
    recomputed; a layer of the vision tower has 0.1 TFLOP and keeps 10 MiB.

    Attributes:
        jobs: All that were asked for.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> list[RankTrace]:
        self.jobs += jobs
        return [self._trace(job) for job in jobs]

    def _trace(self, job: Job) -> RankTrace:
        config, world = job.config, job.world
        parallel = config.parallel
        assert config.pipeline_layers is not None
        size = world // parallel.pipeline
        stage = job.rank // size
        chunks = layers_of_ranks(config.pipeline_layers, parallel.pipeline)[stage]
        layers = sum(map(len, chunks))
        vision = config.vision.num_feature_layers if stage == 0 else 0
        count, held = len(job.workload.micro_batches), parallel.pipeline - stage
        per_row = 20 if config.megatron.get("recompute_granularity") == "full" else 400
        cut = config.micro_batch_shape[0] / parallel.tensor
        flops = int(1e12 * layers * cut * count)
        again = flops if per_row == 20 else 0
        states = state_bytes(config, world)[stage]
        peak = MemorySample(
            "backward",
            0,
            {"attention": int(layers * per_row * MIB * cut) * min(held, count)}
            | ({"vision": 10 * MIB * vision} if vision else {}),
        )
        first = stage * size
        members = tuple(range(first, first + parallel.tensor))
        return RankTrace(
            rank=job.rank,
            world=world,
            stage=stage,
            micro_batches=count,
            compute=(
                compute("attention", "forward", flops=flops, bytes=flops // 500),
                compute("attention", "recompute", flops=again, bytes=again // 500),
                compute("attention", "backward", flops=2 * flops, bytes=flops // 250),
                compute("vision", "forward", flops=10**11 * vision * count),
                compute("optimizer", "update", bytes=states.optimizer * 2, kernels=100),
            ),
            transfers=(
                transfer("tp", members, calls=4 * layers, bytes_sent=layers * MIB * count),
                transfer(
                    "dp",
                    range(first, first + size, parallel.tensor),
                    "reduce_scatter_single",
                    when="update",
                    per_micro_batch=False,
                    bytes_sent=states.gradients,
                ),
            ),
            memory=MemoryTrace(
                weights=states.weights,
                gradients=states.gradients,
                optimizer=states.optimizer,
                peak=peak,
                timeline=(MemorySample("forward", 0, {}), peak, MemorySample("update", 0, {})),
            ),
            expert_rows={},
        )
