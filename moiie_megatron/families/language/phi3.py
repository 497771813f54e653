"""Phi-3 and Phi-3.5: fused projections, a sliding window, LongRoPE.

Names: transformers, ``modeling_phi3.py``.
"""

from __future__ import annotations

from typing import Final

from moiie_megatron.config.schema import LanguageConfig
from moiie_megatron.families import transforms
from moiie_megatron.families.family import ChatFormat, LanguageFamily, Weight
from moiie_megatron.families.language import llama
from moiie_megatron.families.transforms import WeightTransform


def _stacked_qkv(language: LanguageConfig) -> WeightTransform:
    return transforms.stacked_qkv(language.num_attention_heads, language.num_query_groups)


ATTENTION: Final = (
    Weight(
        "language_model.decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.*.input_layernorm.weight",),
        ("hidden",),
    ),
    Weight(
        "language_model.decoder.layers.*.self_attention.linear_qkv.weight",
        ("model.layers.*.self_attn.qkv_proj.weight",),
        ("qkv", "hidden"),
        shard_axis=0,
        transform=_stacked_qkv,
    ),
    Weight(
        "language_model.decoder.layers.*.self_attention.linear_proj.weight",
        ("model.layers.*.self_attn.o_proj.weight",),
        ("hidden", "attention"),
        shard_axis=1,
    ),
)

# A fused gate_up_proj already is [gate | up].
FFN: Final = (
    Weight(
        "language_model.decoder.layers.*.mlp.linear_fc1.weight",
        ("model.layers.*.mlp.gate_up_proj.weight",),
        ("gate_up", "hidden"),
        shard_axis=0,
        shard_blocks=2,
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.linear_fc2.weight",
        ("model.layers.*.mlp.down_proj.weight",),
        ("hidden", "ffn"),
        shard_axis=1,
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.*.post_attention_layernorm.weight",),
        ("hidden",),
    ),
)

EXPERTS: Final = (
    Weight(
        "language_model.decoder.layers.*.mlp.experts.experts.linear_fc1.weight",
        ("model.layers.*.mlp.experts.*.gate_up_proj.weight",),
        ("gate_up", "hidden"),
        shard_axis=0,
        shard_blocks=2,
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.experts.experts.linear_fc2.weight",
        ("model.layers.*.mlp.experts.*.down_proj.weight",),
        ("hidden", "ffn"),
        shard_axis=1,
    ),
)

# microsoft/Phi-3-mini-4k-instruct, "Chat Format"; the system header only where it is used.
CHAT: Final = ChatFormat(
    "phi3",
    header="<|{role}|>\n",
    end="<|end|>",
    gap="\n",
    markers=("<|user|>", "<|assistant|>", "<|end|>"),
)

FAMILY: Final = LanguageFamily(
    "phi3",
    config=llama.CONFIG | {"sliding_window": "sliding_window"},
    weights=(*llama.EMBEDDINGS, *ATTENTION),
    ffn=FFN,
    moe=(*llama.ROUTERS, *EXPERTS, llama.MOE_NORM),
    longrope_names=("longrope", "su"),  # its first name
    chat_formats=(CHAT,),
    default_template="phi3",
)
