"""What a run needs of its machine is told before anything is built or written."""

from __future__ import annotations

import os
from typing import Any

import pytest
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.distributed.reduce_scatter_with_fp32_accumulation import (
    reduce_scatter_with_fp32_accumulation,
)

from moiie_megatron.config.schema import MoEConfig, RunConfig
from moiie_megatron.mcore.device import Device
from moiie_megatron.mcore.device_checks import check_device, own_globals
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel
from moiie_megatron.mcore.run import run_distributed
from tests.helpers.user_errors import user_error
from tests.parity import tiny

LOCAL = Device("cuda", "nccl")
TE = Device("cuda", "nccl", transformer_engine=True)
SELECTIVE = {"recompute_granularity": "selective"}


def run(moe: MoEConfig | None = None, fields: dict[str, Any] | None = None) -> RunConfig:
    return tiny.run_config(tiny.language("llama"), moe, megatron=fields or {})


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that other tests have built in this process leave them behind."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_backend": "flash"}, "attention_backend=flash"),
        ({"apply_rope_fusion": True}, "apply_rope_fusion=true"),
        ({"moe_permute_fusion": True}, "moe_permute_fusion=true"),
        ({"cross_entropy_fusion_impl": "te"}, "cross_entropy_fusion_impl=te"),
        ({**SELECTIVE, "recompute_modules": ["moe", "layernorm"]}, "recompute_modules=[layernorm]"),
        ({**SELECTIVE, "recompute_modules": ["moe_act"]}, "recompute_modules=[moe_act]"),
    ],
)
def test_fields_of_transformer_engine(fields: dict[str, Any], words: str) -> None:
    check_device(run(MoEConfig(), fields), TE)
    with user_error(f"megatron.{words}", "train.transformer_impl: auto", "leave it out"):
        check_device(run(MoEConfig(), fields), LOCAL)


def test_a_kernel_of_a_fusion_that_is_off() -> None:
    """It is on with Transformer Engine alone."""
    native = {"cross_entropy_fusion_impl": "native"}
    check_device(run(fields=native), TE)
    with user_error("cross_entropy_fusion_impl is native", "cross_entropy_loss_fusion is not"):
        check_device(run(fields=native), LOCAL)


def test_fields_that_local_modules_have_too() -> None:
    modules = ["core_attn", "mlp", "moe"]
    fields = {**SELECTIVE, "recompute_modules": modules, "apply_rope_fusion": False}
    check_device(run(MoEConfig(), fields), LOCAL)


@pytest.mark.parametrize("device", [LOCAL, TE], ids=["local", "te"])
def test_the_environment_chooses_no_attention(
    monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    """Megatron stops there with an assertion."""
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    check_device(run(), device)
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with user_error("NVTE_FUSED_ATTN is 0", "megatron.attention_backend", "auto", "unset"):
        check_device(run(), device)


def test_a_backend_agrees_with_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    check_device(run(fields={"attention_backend": "fused"}), TE)
    with user_error("NVTE_FLASH_ATTN is 0", "is flash"):
        check_device(run(fields={"attention_backend": "flash"}), TE)


def test_the_next_run_chooses_anew() -> None:
    with own_globals():
        os.environ["NVTE_FLASH_ATTN"] = "0"
        reduction = param_and_grad_buffer.dist_reduce_scatter_func
        param_and_grad_buffer.dist_reduce_scatter_func = reduce_scatter_with_fp32_accumulation
    assert "NVTE_FLASH_ATTN" not in os.environ
    assert param_and_grad_buffer.dist_reduce_scatter_func is reduction


def test_the_flex_dispatcher_needs_deepep() -> None:
    with user_error("moe.dispatcher is flex", "DeepEP", "moe.dispatcher=moiie"):
        check_device(run(MoEConfig(dispatcher="flex")), TE)


def test_nothing_has_begun_when_it_is_told() -> None:
    calls: list[ParallelContext] = []
    config = run(fields={"attention_backend": "fused"})
    with user_error("megatron.attention_backend=fused", "device: cpu"):
        run_distributed(config, DistEnv(), calls.append)
    destroy_parallel()
    assert calls == []
