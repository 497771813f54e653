"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

Names: transformers, ``modeling_qwen2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moiie_megatron.config.schema import LanguageConfig
from moiie_megatron.families.family import LanguageFamily, UnsupportedError, Weight, qkv
from moiie_megatron.families.language import llama

ATTENTION: Final = (
    *llama.ATTENTION,
    Weight(
        "language_model.decoder.layers.*.self_attention.linear_qkv.bias",
        (
            "model.layers.*.self_attn.q_proj.bias",
            "model.layers.*.self_attn.k_proj.bias",
            "model.layers.*.self_attn.v_proj.bias",
        ),
        ("qkv",),
        shard_axis=0,
        transform=qkv,
    ),
)


def read_window(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """``sliding_window``, if ``use_sliding_window`` is set.

    It applies to the layers that ``layer_types`` names, or to those from ``max_window_layers`` on.
    """
    kinds, first = theirs["layer_types"], theirs["max_window_layers"]
    layers = theirs["num_hidden_layers"]
    if kinds is None:
        with_window = max(0, layers - first)
    else:
        layers = len(kinds)
        with_window = sum(str(kind).startswith("sliding") for kind in kinds)
    if not theirs["use_sliding_window"] or not with_window:
        return {"sliding_window": None}
    if with_window < layers:
        count = f"a window in {with_window} of {layers} layers"
        raise UnsupportedError(
            "max_window_layers", first, f"one in all layers or in none, not {count}"
        )
    return {"sliding_window": theirs["sliding_window"]}


def write_window(language: LanguageConfig) -> dict[str, Any]:
    """The inverse of ``read_window``."""
    if language.sliding_window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": language.sliding_window,
        "max_window_layers": 0,
    }


FAMILY: Final = LanguageFamily(
    "qwen2",
    config=llama.CONFIG | {"sliding_window": "sliding_window"},
    weights=(*llama.EMBEDDINGS, *ATTENTION),
    ffn=llama.FFN,
    moe=llama.MOE,
    fixed={"qkv_bias": True},
    read=read_window,
    write=write_window,
)
