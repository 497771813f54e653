"""Mistral 7B, Mistral NeMo: Llama with a sliding window and heads of any size.

Names: transformers, ``modeling_mistral.py``, which are Llama's.
"""

from __future__ import annotations

from typing import Final

from moiie_megatron.families.family import LanguageFamily
from moiie_megatron.families.language import llama

FAMILY: Final = LanguageFamily(
    "mistral",
    config=llama.CONFIG | {"sliding_window": "sliding_window"},
    weights=(*llama.EMBEDDINGS, *llama.ATTENTION),
    ffn=llama.FFN,
    moe=llama.MOE,
)
