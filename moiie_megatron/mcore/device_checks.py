"""What a configuration needs of the machine, checked before anything is built or written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer.distrib_optimizer import USING_TE_OPTIMIZER
from megatron.core.transformer.moe import fused_a2a

from moiie_megatron.config.megatron_section.sections import (
    ddp_fields,
    megatron_fields,
    optimizer_fields,
)
from moiie_megatron.config.messages import show
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.device import Device
from moiie_megatron.utils.errors import UserError

# Variables by which Megatron tells Transformer Engine the kernels that it may use, and their
# values by attention_backend (models/common/language_module/language_module.py).
_VARIABLES: Final = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_BACKENDS: Final = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001"}


def check_device(config: RunConfig, device: Device) -> None:
    """Refuse settings that need a library, or an environment, that this process does not have.

    Args:
        config: The run.
        device: Where it runs.

    Raises:
        UserError: The first such setting.
    """
    fields = megatron_fields(config)
    if not device.transformer_engine:
        for what in _of_transformer_engine(fields):
            raise UserError(
                f"megatron.{what} needs Transformer Engine's modules, but the model uses local "
                f"ones (device: {device.type}, train.transformer_impl: "
                f"{config.train.transformer_impl}): leave it out."
            )
        if "cross_entropy_fusion_impl" in fields and not fields.get("cross_entropy_loss_fusion"):
            raise UserError(
                "megatron.cross_entropy_fusion_impl is native but "
                "megatron.cross_entropy_loss_fusion is not true: leave one out or set the other."
            )
    backend = fields.get("attention_backend", "auto")
    for name, wanted in zip(_VARIABLES, _BACKENDS[backend], strict=True):
        value = os.environ.get(name, wanted)
        if value != wanted:
            raise UserError(
                f"{name} is {value} in the environment, but megatron.attention_backend is "
                f"{backend}: unset {name} and choose with megatron.attention_backend."
            )
    if config.moe_layers and config.moe.dispatcher == "flex" and not fused_a2a.HAVE_DEEP_EP:
        raise UserError(
            "moe.dispatcher is flex, which needs the package deep_ep, and it is not installed: "
            "install DeepEP, or use moe.dispatcher=moiie."
        )
    _check_overlap(config, device)
    _check_optimizer(config, device)


def overlaps_grad_reduce(config: RunConfig, device: Device) -> bool:
    """Whether gradients are reduced during the backward pass: by default on GPUs."""
    return bool(ddp_fields(config).get("overlap_grad_reduce", device.is_cuda))


def _check_overlap(config: RunConfig, device: Device) -> None:
    """The sections' own check knows only what is given, not what this device's default is."""
    fields = ddp_fields(config)
    if not overlaps_grad_reduce(config, device):
        for name in ("bucket_size", "overlap_param_gather"):
            if fields.get(name):
                raise UserError(
                    f"ddp.{name} is {show(fields[name])} but ddp.overlap_grad_reduce is not true "
                    f"(its default on {device.type} is false): leave {name} out, or use "
                    "ddp.overlap_grad_reduce=true."
                )
    if fields.get("average_in_collective") and not device.is_cuda:
        raise UserError(
            f"ddp.average_in_collective is true but the device is {device.type}, whose collectives "
            "do not average: leave it out."
        )


def _check_optimizer(config: RunConfig, device: Device) -> None:
    fields = optimizer_fields(config)
    if fields.get("optimizer_cpu_offload") and not device.is_cuda:
        raise UserError(
            f"optimizer.megatron.optimizer_cpu_offload is true but the device is {device.type}: "
            "leave it out, all states are in host memory."
        )
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if fields.get(name) and not USING_TE_OPTIMIZER:
            raise UserError(
                f"optimizer.megatron.{name} is true, which needs Transformer Engine's Adam, and "
                "Transformer Engine cannot be imported: leave it out, or use the image of docker/."
            )


def _of_transformer_engine(fields: Mapping[str, Any]) -> Iterator[str]:
    """The fields, with their values, that Transformer Engine alone has."""
    if "attention_backend" in fields:
        yield f"attention_backend={fields['attention_backend']}"
    for fusion in ("apply_rope_fusion", "moe_permute_fusion"):
        if fields.get(fusion):
            yield f"{fusion}=true"
    if fields.get("cross_entropy_fusion_impl") == "te":
        yield "cross_entropy_fusion_impl=te"
    for module in fields.get("recompute_modules", ()):
        if module in ("layernorm", "moe_act"):
            yield f"recompute_modules=[{module}]"


@contextmanager
def own_globals() -> Iterator[None]:
    """Take back, at the end, what Megatron sets for the whole process.

    That are the variables of the environment that choose attention kernels, and the function that
    reduces gradients (``ddp.reduce_scatter_with_fp32_accumulation``).  The next run of this process
    may want others.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    reduction = param_and_grad_buffer.dist_reduce_scatter_func
    try:
        yield
    finally:
        param_and_grad_buffer.dist_reduce_scatter_func = reduction
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
