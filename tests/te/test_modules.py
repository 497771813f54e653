"""Which modules the model is built of, and that its checkpoint is that of the local modules."""

from __future__ import annotations

import pytest
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from moiie_megatron.checkpoint.save_load import sharding_metadata
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.build import build_model
from tests.te.steps import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_classes(te: ParallelContext, family: str) -> None:
    config = tiny_config(family)
    model = build_model(config, te)
    decoder = model.language_model.decoder
    dense, moe = decoder.layers
    found = {
        "attention": type(dense.self_attention.core_attention).__name__,
        "qkv": type(dense.self_attention.linear_qkv).__name__,
        "projection": type(dense.self_attention.linear_proj).__name__,
        "fc1": type(dense.mlp.linear_fc1).__name__,
        "fc2": type(dense.mlp.linear_fc2).__name__,
        "experts": type(moe.mlp.experts).__name__,
        "expert fc1": type(moe.mlp.experts.linear_fc1).__name__,
        "norm of experts": type(moe.pre_mlp_layernorm).__name__,
        "last norm": type(decoder.final_layernorm).__name__,
    }
    assert found == {
        "attention": "TEDotProductAttention",
        "qkv": "TELayerNormColumnParallelLinear",
        "projection": "TERowParallelLinear",
        "fc1": "TELayerNormColumnParallelLinear",
        "fc2": "TERowParallelLinear",
        "experts": "TEGroupedMLP",
        "expert fc1": "TEColumnParallelGroupedLinear",
        "norm of experts": "RMSNorm",
        "last norm": "RMSNorm",
    }
    attention = dense.self_attention
    norms = (attention.q_layernorm, attention.k_layernorm)
    # Without one, Megatron-Core 0.16 has a module that changes nothing, 0.19 has none.
    kinds = {"RMSNorm"} if config.language.qk_norm else {"IdentityOp", "NoneType"}
    assert {type(norm).__name__ for norm in norms} <= kinds
    for norm in (moe.pre_mlp_layernorm, decoder.final_layernorm):
        assert type(norm).__module__.startswith("transformer_engine")
    window = config.language.sliding_window
    assert attention.core_attention.window_size == ((-1, 0) if window is None else (window - 1, 0))
    scale = model.config.softmax_scale
    if scale is not None:
        assert attention.core_attention.flash_attention.softmax_scale == scale
    assert (scale is not None) == (config.language.longrope is not None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("moe", [True, False], ids=["experts", "dense"])
def test_checkpoint(te: ParallelContext, local: ParallelContext, family: str, moe: bool) -> None:
    """The same shards: names, offsets, shapes, dtypes.  Only extra state differs."""
    config = tiny_config(family)
    stage = config.stage.model_copy(update={"moe": moe})
    config = config.model_copy(update={"stage": stage})
    shards, objects = {}, {}
    for name, context in (("te", te), ("local", local)):
        state = build_model(config, context).sharded_state_dict(metadata=sharding_metadata(context))
        shards[name] = {
            (shard.key, shard.global_offset): (shard.global_shape, shard.local_shape, shard.dtype)
            for entry in state.values()
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
            for shard in (entry.build() if isinstance(entry, ShardedTensorFactory) else [entry])
        }
        objects[name] = {v.key for v in state.values() if isinstance(v, ShardedObject)}
    assert shards["te"] == shards["local"]
    assert any("experts.linear_fc1" in key for key, _ in shards["te"]) == moe
    assert objects["local"] < objects["te"]
    assert all(key.endswith("_extra_state") for key in objects["te"])
