"""Qwen3: Llama with a norm on every query and key head, and heads of any size.

Names: transformers, ``modeling_qwen3.py``.
"""

from __future__ import annotations

from typing import Final

from moiie_megatron.families.family import LanguageFamily, Weight
from moiie_megatron.families.language import llama, qwen2

ATTENTION: Final = (
    *llama.ATTENTION,
    Weight(
        "language_model.decoder.layers.*.self_attention.q_layernorm.weight",
        ("model.layers.*.self_attn.q_norm.weight",),
        ("head",),
    ),
    Weight(
        "language_model.decoder.layers.*.self_attention.k_layernorm.weight",
        ("model.layers.*.self_attn.k_norm.weight",),
        ("head",),
    ),
)

FAMILY: Final = LanguageFamily(
    "qwen3",
    config=llama.CONFIG | {"sliding_window": "sliding_window"},
    weights=(*llama.EMBEDDINGS, *ATTENTION),
    ffn=llama.FFN,
    moe=llama.MOE,
    fixed={"qk_norm": True},
    read=qwen2.read_window,
    write=qwen2.write_window,
)
