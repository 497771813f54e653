"""Module specifications of the decoder: Transformer Engine's modules on GPUs, else local ones."""

from __future__ import annotations

import copy
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moiie_megatron.mcore.attention import SDPACoreAttention
from moiie_megatron.mcore.device import Device
from moiie_megatron.mcore.inference.attention import CachedSelfAttention
from moiie_megatron.mcore.norm import RMSNorm


def decoder_spec(
    config: TransformerConfig,
    device: Device,
    *,
    moe_module: ModuleSpec | None,
    layers: range,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, in order.

    Args:
        config: Megatron's configuration of the language model.
        device: Where the model runs.
        moe_module: Replaces the FFN in the layers that ``config.moe_layer_freq`` marks; None for
            a dense model.
        layers: Those of the stage, from 0 (``RunConfig.pipeline_layers``).
    """
    dense = _dense_layer(config, device)
    specs = [dense] * config.num_layers
    if moe_module is not None:
        moe = _with_mlp(dense, moe_module, device)
        assert isinstance(config.moe_layer_freq, list)
        specs = [moe if flag else dense for flag in config.moe_layer_freq]
    here = [specs[layer] for layer in layers]
    return TransformerBlockSubmodules(layer_specs=here, layer_norm=_norm(device))


def submodules_of(spec: Any) -> Any:
    """The submodules of a specification of Megatron's own.

    Those of MoE layers are a ``ModuleSpec`` in 0.16 and 0.17, later a ``functools.partial``.
    """
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def _norm(device: Device) -> Any:
    if device.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm


def _dense_layer(config: TransformerConfig, device: Device) -> ModuleSpec:
    if device.transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        spec.submodules.self_attention.module = CachedSelfAttention
        return spec
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.module = CachedSelfAttention
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _with_mlp(dense: ModuleSpec, mlp: ModuleSpec, device: Device) -> ModuleSpec:
    """The same layer with experts in place of the FFN.

    The norm in front of them is not fused into a linear layer.
    """
    spec = copy.deepcopy(dense)
    spec.submodules.mlp = mlp
    spec.submodules.pre_mlp_layernorm = _norm(device)
    # It is stored under its own name, not as part of linear_fc1, as in Megatron's MoE specs for
    # Transformer Engine.
    spec.submodules.sharded_state_dict_keys_map = {
        source: target
        for source, target in spec.submodules.sharded_state_dict_keys_map.items()
        if source.startswith("input_layernorm")
    }
    return spec
