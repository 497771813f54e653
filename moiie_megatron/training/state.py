"""Model, data-parallel wrapper, optimizer and learning-rate schedule of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.config import (
    connect_schedules,
    ddp_config,
    lr_scheduler,
    optimizer_config,
    part_overrides,
)
from moiie_megatron.mcore.optimizer import SkipNonFiniteOptimizer
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.patches.adamw import use_fused_adamw
from moiie_megatron.mcore.patches.bucket_order import keep_bucket_order
from moiie_megatron.training.param_gather import complete_hooks, gather_all
from moiie_megatron.training.stages import PARTS, apply_stage, part_mark
from moiie_megatron.vlm.chunks import ModelChunks


@dataclass(frozen=True)
class TrainState:
    """What a step needs.

    Attributes:
        model: This rank's part of the bare model.
        ddp: The data-parallel wrapper of each of its chunks.
        optimizer: Of all chunks.
        scheduler: Of the learning rates.
    """

    model: ModelChunks
    ddp: list[DistributedDataParallel]
    optimizer: SkipNonFiniteOptimizer
    scheduler: OptimizerParamScheduler

    def state_parts(self) -> dict[str, Any]:
        """The stateful objects by their name in a checkpoint."""
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def gather_weights(self) -> None:
        """Let every rank read all weights between two steps; all ranks must call this."""
        for wrapper in self.ddp:
            gather_all(wrapper)

    def learning_rates(self, config: RunConfig) -> dict[str, float]:
        """The learning rate of the next step by part; equal on all ranks."""
        ratio = config.optimizer.min_lr_ratio
        return {
            part: self.scheduler.get_lr({"max_lr": lr, "min_lr": lr * ratio})
            for part, lr in config.stage.learning_rates.items()
        }


def prepare_training(
    config: RunConfig, context: ParallelContext, model: ModelChunks, steps: int
) -> TrainState:
    """Wrap a model and build its optimizer, which takes an fp32 copy of the trained weights.

    Args:
        model: Must hold its initial weights.
        steps: Optimizer steps of the whole run, the length of the schedule.
    """
    apply_stage(model, config.stage)
    ddp = [
        DistributedDataParallel(
            chunk.config,
            ddp_config(config, context.device),
            chunk,
            # As in Megatron-LM: the reduction of a later chunk overlaps with the backward pass of
            # the chunks before it.
            disable_bucketing=number > 0,
            pg_collection=context.groups,
        )
        for number, chunk in enumerate(model)
    ]
    for wrapper in ddp:
        wrapper.broadcast_params()
    optimizer_fields = optimizer_config(config, context.device)
    marks: dict[str, str] = {part: part_mark(part) for part in PARTS}
    chained = get_megatron_optimizer(
        optimizer_fields,
        ddp,
        config_overrides=part_overrides(config, optimizer_fields, marks),
        use_gloo_process_groups=False,
        pg_collection=context.groups,
    )
    use_fused_adamw(chained)
    optimizer = SkipNonFiniteOptimizer(chained.chained_optimizers)
    connect_schedules(ddp)
    for wrapper in ddp:
        keep_bucket_order(wrapper)
        complete_hooks(wrapper)
    return TrainState(model, ddp, optimizer, lr_scheduler(config, optimizer, steps))
