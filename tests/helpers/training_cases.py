"""Two steps of a tiny model for every field that ``ddp`` and ``optimizer.megatron`` may set."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor

from moiie_megatron.config.megatron_section.sections import DDP, OPTIMIZER
from moiie_megatron.config.megatron_section.table import MegatronSection
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.batches import image_batch, text_batch
from tests.helpers.megatron_cases import Case, tiny_config

CLASSES: dict[str, type] = {
    DDP.key: DistributedDataParallelConfig,
    OPTIMIZER.key: OptimizerConfig,
}
_OVERLAP = {"overlap_grad_reduce": True}
_BF16 = {"grad_reduce_in_fp32": False}
_AWARE = {"use_precision_aware_optimizer": True}
_OFFLOAD = {"optimizer_cpu_offload": True}

# The first field is what a case is about.
DDP_CASES: tuple[Case, ...] = (
    dict(_OVERLAP),
    {"overlap_param_gather": True, **_OVERLAP},
    {"bucket_size": 2000, **_OVERLAP},
    {"pad_buckets_for_high_nccl_busbw": True},
    dict(_BF16),
    {"reduce_scatter_with_fp32_accumulation": True, **_BF16},
)
# With Transformer Engine's Adam.
OPTIMIZER_CASES: tuple[Case, ...] = (
    dict(_AWARE),
    {"main_params_dtype": "fp16", **_AWARE},
    {"exp_avg_dtype": "bf16", **_AWARE},
    {"exp_avg_sq_dtype": "bf16", **_AWARE},
)
# On a GPU alone.
GPU_CASES: tuple[tuple[MegatronSection, Case], ...] = (
    (DDP, {"average_in_collective": True}),
    (OPTIMIZER, dict(_OFFLOAD)),
    (OPTIMIZER, {"optimizer_offload_fraction": 0.5, **_OFFLOAD}),
    (OPTIMIZER, {"overlap_cpu_optimizer_d2h_h2d": True, **_OFFLOAD}),
    (OPTIMIZER, {"pin_cpu_grads": False, **_OFFLOAD}),
)


def fields_of(section: MegatronSection) -> dict[str, Any]:
    """The fields of the installed class."""
    return {field.name: field for field in dataclasses.fields(CLASSES[section.key])}


def with_fields(section: MegatronSection, case: Case) -> RunConfig:
    """A bf16 run of the tiny model with fields of one of the two sections."""
    config = tiny_config(True)
    train = config.train.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"train": train})
    if section is DDP:
        return config.model_copy(update={"ddp": case})
    optimizer = config.optimizer.model_copy(update={"megatron": case})
    return config.model_copy(update={"optimizer": optimizer})


def take_steps(config: RunConfig, context: ParallelContext) -> dict[str, Tensor]:
    """Weights after two steps, and losses and gradients of the second one.

    Raises:
        UserError: The configuration is refused.
    """
    check_config(config, world_size=context.size)
    seed_everything(3, context.groups)
    model = build_chunks(config, context)
    state = prepare_training(config, context, model, steps=3)
    state.model.train()
    for _ in range(2):
        result = train_step(config, context, state, [image_batch(0), text_batch(1)])
    found = {"losses": result.micro_batch_losses, "norm": torch.tensor(result.grad_norm)}
    state.gather_weights()
    for name, parameter in model.named_parameters():
        found[f"weight/{name}"] = parameter.detach().float().clone()
        if parameter.requires_grad:
            found[f"grad/{name}"] = parameter.main_grad.float().clone()
    return found
