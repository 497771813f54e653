"""From the configuration of a run to Megatron-Core's configuration objects."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moiie_megatron.config.schema import MoEConfig, OptimizerConfig, ParallelConfig, RunConfig
from moiie_megatron.mcore import config as mcore_config
from moiie_megatron.mcore.config import (
    ddp_config,
    optimizer_config,
    transformer_config,
)
from moiie_megatron.mcore.device import Device
from tests.parity import tiny

CPU = Device("cpu", "gloo")


def run(moe: MoEConfig | None = None, **sections: Any) -> RunConfig:
    return tiny.run_config(tiny.language("llama"), moe, **sections)


def test_sizes_and_dtypes() -> None:
    config = transformer_config(run(), CPU)
    sizes = (config.num_layers, config.hidden_size, config.ffn_hidden_size, config.kv_channels)
    assert sizes == (4, 64, 128, 16)
    assert config.params_dtype == torch.float32 and not config.bf16
    assert config.num_moe_experts is None and config.use_cpu_initialization


def test_interleaved_experts_are_in_layers_1_and_3() -> None:
    """Megatron's own ``moe_layer_freq=2`` would choose 0 and 2."""
    config = transformer_config(run(MoEConfig()), CPU)
    assert config.moe_layer_freq == [0, 1, 0, 1]
    assert (config.num_moe_experts, config.moe_router_topk) == (4, 2)
    assert config.moe_router_load_balancing_type == "none"
    assert config.moe_token_dispatcher_type == "alltoall"  # replaced by MoIIELayer


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_megatrons_dispatchers_are_passed_on(dispatcher: str) -> None:
    config = transformer_config(run(MoEConfig(dispatcher=dispatcher)), CPU)
    assert config.moe_token_dispatcher_type == dispatcher


def test_a_sliding_window_includes_the_token_itself() -> None:
    config = tiny.run_config(tiny.language("phi3", sliding_window=5))
    assert transformer_config(config, CPU).window_size == (4, 0)


def test_longrope_scales_the_scores_twice() -> None:
    longrope = {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    }
    attention_factor = math.sqrt(1 + math.log(4) / math.log(16))
    config = tiny.run_config(tiny.language("phi3", longrope=longrope))
    assert transformer_config(config, CPU).softmax_scale == pytest.approx(
        attention_factor**2 / math.sqrt(16)
    )


def test_lengths_vary_only_between_pipeline_stages() -> None:
    for stages, varies in ((1, False), (2, True)):
        config = run(parallel=ParallelConfig(pipeline=stages))
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"padding": "longest"})}
        )
        assert transformer_config(config, CPU).variable_seq_lengths == varies


def test_the_megatron_section_is_passed_on_with_its_types() -> None:
    section = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    megatron = transformer_config(run(megatron={**section, "init_method_std": "0.5"}), CPU)
    assert megatron.recompute_modules == ["core_attn"] and megatron.init_method_std == 0.5


def test_optimizer_and_gradients() -> None:
    optimizer = optimizer_config(run(), CPU)
    assert optimizer.lr == 1e-3 and not optimizer.bf16
    ddp = ddp_config(run(), CPU)
    assert ddp.grad_reduce_in_fp32 and not ddp.overlap_grad_reduce


@pytest.mark.parametrize(
    ("distributed", "ddp", "overlaps"),
    [
        (True, {}, (True, True)),
        (False, {}, (True, False)),
        (True, {"overlap_param_gather": False}, (True, False)),
        (True, {"overlap_grad_reduce": False}, (False, False)),
    ],
)
def test_what_overlaps_on_gpus(
    distributed: bool, ddp: dict[str, Any], overlaps: tuple[bool, bool]
) -> None:
    config = run().model_copy(
        update={"ddp": ddp, "optimizer": OptimizerConfig(distributed=distributed)}
    )
    built = ddp_config(config, Device("cuda", "nccl"))
    assert (built.overlap_grad_reduce, built.overlap_param_gather) == overlaps


def test_where_weight_gradients_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs, by Transformer Engine's layers or with Apex."""
    kinds = {(te, apex): (te or apex) for te in (True, False) for apex in (True, False)}
    for (te, apex), fused in kinds.items():
        monkeypatch.setattr(mcore_config, "HAS_APEX_EXTENSION", apex)
        device = Device("cuda", "nccl", transformer_engine=te)
        assert mcore_config._fuses_weight_gradients(device) == fused
    assert not mcore_config._fuses_weight_gradients(Device("cpu", "gloo", True))


@pytest.mark.parametrize("stages", [1, 2])
def test_sent_activations_are_freed(stages: int) -> None:
    config = transformer_config(run(parallel=ParallelConfig(pipeline=stages)), CPU)
    assert config.deallocate_pipeline_outputs == (stages > 1)


def test_virtual_stages() -> None:
    """They send behind the computation, so that what they send must not be freed."""
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    config = transformer_config(run(parallel=parallel), CPU)
    assert config.virtual_pipeline_model_parallel_size == 2
    assert config.overlap_p2p_comm and not config.batch_p2p_comm
    assert not config.deallocate_pipeline_outputs
