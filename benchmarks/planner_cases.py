"""The layouts of ``benchmarks/planner.py``, and what a rank of each gets to process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload

EXAMPLES: Final = Path(__file__).resolve().parents[1] / "examples/configs"
MICRO_BATCHES: Final = 4  # of a data-parallel rank in one step
ROWS: Final = 4  # of a micro-batch


@dataclass(frozen=True)
class Case:
    """One layout.

    Attributes:
        name: For tables and the command line.
        world: Number of processes.
        overrides: Of the configuration.
        file: The configuration, one of the examples.
    """

    name: str
    world: int
    overrides: tuple[str, ...] = ()
    file: str = "digits-stage2"

    def config(self) -> RunConfig:
        """The run."""
        rows = ROWS * MICRO_BATCHES
        words = [f"train.micro_batch_size={ROWS}", f"train.global_batch_size={rows * self.world}"]
        return load_config(EXAMPLES / f"{self.file}.yaml", [*words, *self.overrides])


FULL = (
    "megatron.recompute_granularity=full",
    "megatron.recompute_method=uniform",
    "megatron.recompute_num_layers=1",
)
_SELECTIVE = (
    "megatron.recompute_granularity=selective",
    "megatron.recompute_modules=[core_attn, mlp, moe]",
)
_DENSE = "digits-dense"
_TIED = "language.tied_embeddings=true"
OVERLAP = ("ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true")
_ONE = "parallel.expert=1"
PACKING = "data.packing=true"
_FIXED = "data.padding=sequence_length"


def parallel(**degrees: int) -> tuple[str, ...]:
    """Overrides of the section; experts are not spread where that is not asked for."""
    return tuple(f"parallel.{name}={degree}" for name, degree in ({"expert": 1} | degrees).items())


_QWEN3 = ("language.family=qwen3", "language.qk_norm=true", "language.tied_embeddings=true")

CASES: Final = (
    Case("one process", 1, (_ONE,)),
    Case("full recomputation", 1, (_ONE, *FULL, "vision.recompute=true")),
    Case("selective recomputation", 1, (_ONE, *_SELECTIVE)),
    Case("packing", 1, (_ONE, PACKING)),
    Case("dense", 1, (), "digits-dense"),
    Case("stage 1, connector alone", 1, (), "digits-stage1"),
    Case("vision frozen", 1, (_ONE, "stage.learning_rates.vision=null")),
    Case("Qwen3, tied embeddings", 1, (_ONE, *_QWEN3)),
    Case("bf16", 1, (_ONE, "train.precision=bf16")),
    Case("EP=2", 2),
    Case("EP=2, alltoall", 2, ("moe.dispatcher=alltoall",)),
    Case("EP=2, allgather", 2, ("moe.dispatcher=allgather", _FIXED)),
    Case("EP=2, packing, full", 2, (PACKING, *FULL)),
    Case("TP=2", 2, parallel(tensor=2)),
    Case("TP=2, ETP=2", 2, parallel(tensor=2, expert_tensor=2)),
    Case("dense, TP=2 without SP", 2, ("parallel.tensor=2", "parallel.sequence=false"), _DENSE),
    Case("dense, PP=2, tied embeddings", 2, ("parallel.pipeline=2", _TIED), _DENSE),
    Case("PP=2", 2, parallel(pipeline=2)),
    Case("PP=2, two virtual stages", 2, parallel(pipeline=2, virtual_pipeline=2)),
    Case("DP=2", 2, parallel()),
    Case("DP=2, overlapped", 2, (*parallel(), *OVERLAP)),
    Case("DP=2, optimizer not distributed", 2, (*parallel(), "optimizer.distributed=false")),
    Case("TP=2, EP=2, DP=2", 4, parallel(tensor=2, expert=2)),
    Case("TP=2, PP=2, packing", 4, (PACKING, *parallel(tensor=2, pipeline=2))),
    Case("PP=2, EP=2, full", 4, (*FULL, *parallel(pipeline=2, expert=2))),
    Case(
        "TP=2, ETP=2, EP=2, alltoall",
        4,
        (*parallel(tensor=2, expert_tensor=2, expert=2), "moe.dispatcher=alltoall"),
    ),
)


def workload(config: RunConfig, micro_batches: int = MICRO_BATCHES) -> Workload:
    """Micro-batches whose samples differ in length and in their number of images."""
    rows, length = config.micro_batch_shape
    if config.data.packing:
        samples = (
            SampleShape(length // 2, 1, 20),
            SampleShape(length // 4, 0, 20),
            SampleShape(length // 8, 1, 10),
        )
        shape = MicroBatchShape((samples,), length)
    else:
        shape = MicroBatchShape(
            tuple(
                (SampleShape(length - 8 * row, 1 + row % 2, length // 8),) for row in range(rows)
            ),
            length,
        )
    return Workload((shape,) * micro_batches, "samples of several lengths")
