"""Conditions on the sections ``ddp`` and ``optimizer.megatron``.

Every violated condition is one ``UserError`` sentence with the field, its value and the remedy.
Those that depend on the device are in ``mcore/device_checks.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from moiie_megatron.config.megatron_section.sections import ddp_fields, optimizer_fields
from moiie_megatron.config.messages import show
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError

# Fields that are without effect unless a field of the same section is true.
_OF_PRECISION: Final = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
_OF_OFFLOAD: Final = (
    "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d",
    "pin_cpu_grads",
)


def check_training_sections(config: RunConfig) -> None:
    """Refuse fields that may not be set, wrong values, and fields that would have no effect.

    Raises:
        UserError: The first one.
    """
    _check_ddp(config, ddp_fields(config))
    _check_optimizer(config, optimizer_fields(config))


def _check_ddp(config: RunConfig, fields: dict[str, Any]) -> None:
    if fields.get("overlap_grad_reduce") is False:
        _need(fields, "ddp", ("bucket_size",), "overlap_grad_reduce")
        if fields.get("overlap_param_gather"):
            _need(fields, "ddp", ("overlap_param_gather",), "overlap_grad_reduce")
    for name in (
        "overlap_param_gather",
        "pad_buckets_for_high_nccl_busbw",
        "reduce_scatter_with_fp32_accumulation",
    ):
        if fields.get(name) and not config.optimizer.distributed:
            raise UserError(
                f"ddp.{name} is true but optimizer.distributed is false: leave it out, or use "
                "optimizer.distributed=true."
            )
    if fields.get("grad_reduce_in_fp32") is False and config.train.precision != "bf16":
        raise UserError(
            f"ddp.grad_reduce_in_fp32 is false but train.precision is {config.train.precision}: "
            "leave it out, gradients have the dtype of the weights."
        )
    if fields.get("reduce_scatter_with_fp32_accumulation"):
        if fields.get("grad_reduce_in_fp32", True):
            raise UserError(
                "ddp.reduce_scatter_with_fp32_accumulation is true but ddp.grad_reduce_in_fp32 is "
                "not false: leave it out, gradients are reduced in fp32 already."
            )
        if fields.get("average_in_collective"):
            raise UserError(
                "ddp.reduce_scatter_with_fp32_accumulation and ddp.average_in_collective are both "
                "true: leave one of them out."
            )


def _check_optimizer(config: RunConfig, fields: dict[str, Any]) -> None:
    section = "optimizer.megatron"
    if not fields.get("use_precision_aware_optimizer"):
        _need(fields, section, _OF_PRECISION, "use_precision_aware_optimizer")
    if not fields.get("optimizer_cpu_offload"):
        _need(fields, section, _OF_OFFLOAD, "optimizer_cpu_offload")
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if fields.get(name) and not config.optimizer.distributed:
            raise UserError(
                f"{section}.{name} is true but optimizer.distributed is false: leave it out, or "
                "use optimizer.distributed=true."
            )
        if fields.get(name) and config.train.precision != "bf16":
            raise UserError(
                f"{section}.{name} is true but train.precision is {config.train.precision}: leave "
                "it out, or use train.precision=bf16."
            )
    dtypes = [name for name in _OF_PRECISION if fields.get(name, "fp32") != "fp32"]
    if fields.get("optimizer_cpu_offload") and dtypes:
        raise UserError(
            f"{section}.{dtypes[0]} is {show(fields[dtypes[0]])} but "
            f"{section}.optimizer_cpu_offload is true: leave one of them out, states in host "
            "memory are fp32."
        )


def _need(fields: dict[str, Any], section: str, names: Iterable[str], condition: str) -> None:
    """Refuse fields that are without effect unless another one is true."""
    for name in names:
        if name in fields:
            raise UserError(
                f"{section}.{name} is {show(fields[name])} but {section}.{condition} is not true: "
                f"leave {name} out, or use {section}.{condition}=true."
            )
