"""Values of the sections ``ddp`` and ``optimizer.megatron`` that fit together, and others."""

from __future__ import annotations

from typing import Any

import pytest

from moiie_megatron.config.megatron_section.check_training import check_training_sections
from moiie_megatron.config.megatron_section.sections import ddp_fields, optimizer_fields
from moiie_megatron.config.schema import OptimizerConfig, RunConfig
from tests.helpers.user_errors import user_error
from tests.parity import tiny

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
BF16 = {"grad_reduce_in_fp32": False}
FP32_SUM = {"reduce_scatter_with_fp32_accumulation": True}
AWARE = {"use_precision_aware_optimizer": True}
OFFLOAD = {"optimizer_cpu_offload": True}


def run(
    ddp: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    precision: str = "bf16",
    distributed: bool = True,
) -> RunConfig:
    config = tiny.run_config(tiny.language("llama"), ddp=ddp or {})
    train = config.train.model_copy(update={"precision": precision})
    section = OptimizerConfig(distributed=distributed, megatron=optimizer or {})
    return config.model_copy(update={"train": train, "optimizer": section})


@pytest.mark.parametrize(
    ("ddp", "optimizer"),
    [
        ({}, {}),
        ({**OVERLAP, "bucket_size": 10, "pad_buckets_for_high_nccl_busbw": True}, {}),
        ({**BF16, **FP32_SUM}, {"exp_avg_dtype": None}),
        ({**BF16, "average_in_collective": True}, AWARE),
        ({"overlap_grad_reduce": False, "overlap_param_gather": False}, {}),
        ({}, {**AWARE, "exp_avg_dtype": "bf16", "main_params_dtype": "fp16"}),
        ({}, {**OFFLOAD, **AWARE, "exp_avg_dtype": "fp32"}),
        ({}, {**OFFLOAD, "optimizer_offload_fraction": 0.5, "pin_cpu_grads": False}),
    ],
)
def test_possible_sections(ddp: dict[str, Any], optimizer: dict[str, Any]) -> None:
    config = run(ddp, optimizer)
    check_training_sections(config)
    assert ddp_fields(config) == ddp
    given = {name: value for name, value in optimizer.items() if value is not None}
    assert optimizer_fields(config) == given


@pytest.mark.parametrize(
    ("ddp", "parts"),
    [
        ({"bucket_sise": 1}, ("ddp.bucket_sise", "did you mean bucket_size?")),
        ({"exp_avg_dtype": "bf16"}, ("ddp.exp_avg_dtype", "belongs to", "optimizer.megatron")),
        ({"use_distributed_optimizer": True}, ("set by optimizer.distributed", "ddp section")),
        ({"use_megatron_fsdp": True}, ("ddp.use_megatron_fsdp", "FSDP is not supported")),
        ({"check_for_nan_in_grad": True}, ("is skipped", "train.max_skipped_steps")),
        ({"bucket_size": 0}, ("ddp.bucket_size is 0", "whole number above 0")),
        ({"overlap_grad_reduce": "often"}, ("'often'", "true or false")),
        ({**OVERLAP, "overlap_grad_reduce": False}, ("overlap_param_gather is True", "not true")),
        ({"overlap_grad_reduce": False, "bucket_size": 9}, ("bucket_size is 9", "not true")),
        (FP32_SUM, ("ddp.reduce_scatter_with_fp32_accumulation", "grad_reduce_in_fp32 is not")),
        ({**BF16, **FP32_SUM, "average_in_collective": True}, ("are both true", "leave one")),
    ],
)
def test_impossible_ddp_sections(ddp: dict[str, Any], parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        check_training_sections(run(ddp))


@pytest.mark.parametrize(
    ("optimizer", "parts"),
    [
        ({"adam_beta1": 0.5}, ("optimizer.megatron.adam_beta1", "optimizer.beta1", "leave it")),
        ({"main_grads_dtype": "bf16"}, ("set by ddp.grad_reduce_in_fp32",)),
        ({"optimizer": "muon"}, ("'muon'", "AdamW")),
        ({"loss_scale": 2}, ("optimizer.megatron.loss_scale is 2", "FP16")),
        ({"bucket_size": 1}, ("optimizer.megatron.bucket_size", "section ddp")),
        ({**AWARE, "exp_avg_dtype": "float8"}, ("'float8'", "fp32, bf16 or fp16")),
        ({**AWARE, "main_params_dtype": "bf16"}, ("'bf16'", "fp32 or fp16")),
        ({"exp_avg_dtype": "bf16"}, ("exp_avg_dtype is 'bf16'", "use_precision_aware_optimizer")),
        ({"pin_cpu_grads": False}, ("pin_cpu_grads is False", "optimizer_cpu_offload is not")),
        ({**OFFLOAD, "optimizer_offload_fraction": 0}, ("optimizer_offload_fraction", "above 0")),
        ({**OFFLOAD, **AWARE, "exp_avg_dtype": "bf16"}, ("exp_avg_dtype is 'bf16'", "are fp32")),
    ],
)
def test_impossible_optimizer_sections(optimizer: dict[str, Any], parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        check_training_sections(run({}, optimizer))


@pytest.mark.parametrize(
    ("ddp", "optimizer"),
    [
        ({"overlap_param_gather": True}, {}),
        ({"pad_buckets_for_high_nccl_busbw": True}, {}),
        ({**BF16, **FP32_SUM}, {}),
        ({}, AWARE),
        ({}, OFFLOAD),
    ],
)
def test_what_needs_the_distributed_optimizer(
    ddp: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    with user_error("optimizer.distributed is false", "optimizer.distributed=true"):
        check_training_sections(run(ddp, optimizer, distributed=False))


def test_gradients_of_fp32_weights_are_fp32() -> None:
    with user_error("ddp.grad_reduce_in_fp32 is false", "train.precision is fp32"):
        check_training_sections(run(BF16, precision="fp32"))


@pytest.mark.parametrize("field", [AWARE, OFFLOAD])
def test_fp32_weights_need_no_copies(field: dict[str, Any]) -> None:
    with user_error(f"optimizer.megatron.{next(iter(field))} is true", "train.precision is fp32"):
        check_training_sections(run({}, field, precision="fp32"))
