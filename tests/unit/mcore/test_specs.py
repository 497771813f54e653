"""Which modules the decoder's layers are made of, on every pipeline stage."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from moiie_megatron.mcore.attention import SDPACoreAttention
from moiie_megatron.mcore.device import Device
from moiie_megatron.mcore.norm import RMSNorm
from moiie_megatron.mcore.specs import decoder_spec

CPU = Device("cpu", "gloo")
EXPERTS = ModuleSpec(module=torch.nn.Identity)


def config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2}
    if "moe_layer_freq" in changes:
        values["num_moe_experts"] = 2
    return TransformerConfig(**values, **changes)


def mlps(spec: Any) -> list[type]:
    return [built_class(layer.submodules.mlp) for layer in spec.layer_specs]


def built_class(mlp: Any) -> type:
    """Of a ``ModuleSpec`` or, from 0.18 on, a partial of ``MLP.as_mlp_submodule``."""
    return mlp.func.__self__ if isinstance(mlp, functools.partial) else mlp.module


def test_a_dense_decoder() -> None:
    spec = decoder_spec(config(), CPU, moe_module=None, layers=range(4))
    assert mlps(spec) == [MLP] * 4 and spec.layer_norm is RMSNorm
    layer = spec.layer_specs[0].submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is RMSNorm
    assert layer.self_attention.submodules.core_attention is SDPACoreAttention


def test_experts_are_where_the_configuration_says() -> None:
    every_second = config(moe_layer_freq=[0, 1, 0, 1])
    spec = decoder_spec(every_second, CPU, moe_module=EXPERTS, layers=range(4))
    assert mlps(spec) == [MLP, torch.nn.Identity, MLP, torch.nn.Identity]


def test_a_stage_gets_its_own_layers() -> None:
    whole = config(moe_layer_freq=[0, 1, 1, 0])
    first, second = (
        mlps(decoder_spec(whole, CPU, moe_module=EXPERTS, layers=layers))
        for layers in (range(1), range(1, 4))
    )
    assert first == [MLP] and second == [torch.nn.Identity, torch.nn.Identity, MLP]


def test_the_norm_before_experts_keeps_its_checkpoint_name() -> None:
    """In a dense layer it is stored as part of the FFN's first linear layer."""
    every_second = config(moe_layer_freq=[0, 1, 0, 1])
    spec = decoder_spec(every_second, CPU, moe_module=EXPERTS, layers=range(4))
    dense, moe = (layer.submodules.sharded_state_dict_keys_map for layer in spec.layer_specs[:2])
    assert dense["pre_mlp_layernorm."] == "mlp.linear_fc1.layer_norm_"
    assert "pre_mlp_layernorm." not in moe
    assert moe["input_layernorm."] == dense["input_layernorm."]
