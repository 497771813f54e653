"""Which model families there are: a line for each, everything else is in the file that it names.

A family's file may import torch and transformers inside functions alone: configurations are
checked on machines without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final

# language.family -> module with FAMILY, a families.family.LanguageFamily
LANGUAGE_FAMILIES: Final = {
    "llama": "moiie_megatron.families.language.llama",
    "phi3": "moiie_megatron.families.language.phi3",
    "mixtral": "moiie_megatron.families.language.mixtral",
    "mistral": "moiie_megatron.families.language.mistral",
    "qwen2": "moiie_megatron.families.language.qwen2",
    "qwen3": "moiie_megatron.families.language.qwen3",
}

# vision.family -> module with FAMILY, a families.family.VisionFamily
VISION_FAMILIES: Final = {
    "siglip": "moiie_megatron.families.vision.siglip",
    "clip": "moiie_megatron.families.vision.clip",
}


def load_family(registry: Mapping[str, str], name: str) -> Any:
    """What the module of a family defines; imported here, for it stands above this folder."""
    return importlib.import_module(registry[name]).FAMILY


def template_names() -> tuple[str, ...]:
    """What ``stage.template`` may be: a family's chat format, the tokenizer's own or none."""
    families = [load_family(LANGUAGE_FAMILIES, name) for name in LANGUAGE_FAMILIES]
    return (
        "plain",
        *(chat.name for family in families for chat in family.chat_formats),
        "tokenizer",
    )
