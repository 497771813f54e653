"""What shape every tensor of a checkpoint has, from the configuration alone."""

from __future__ import annotations

import re

from moiie_megatron.config.schema import LanguageConfig, RunConfig, VisionConfig
from moiie_megatron.families import weight_map


def expected_shape(config: RunConfig, name: str) -> tuple[int, ...]:
    """The full shape of a Megatron tensor; for experts that of one expert.

    Args:
        name: A name from the tables.
    """
    if name.startswith(weight_map.VISION):
        return vision_shape(config.vision, name.removeprefix(weight_map.VISION))
    if name.startswith(weight_map.CONNECTOR):
        language, image = config.language.hidden_size, config.vision.hidden_size
        inner = config.connector.hidden_size or language
        shape = (inner, image) if "linear_1" in name else (language, inner)
        return shape if name.endswith("weight") else shape[:1]
    if weight_map.ROUTER in name:
        layout = config.moe.layout
        router = next(r for r in layout.routers if name.endswith(f"{weight_map.ROUTER}{r}"))
        return (len(layout.allowed(router)), config.language.hidden_size)
    return language_shape(config.language, name)


def language_shape(language: LanguageConfig, name: str) -> tuple[int, ...]:
    """The same for a name of the language model (with or without its prefix)."""
    hidden, ffn = language.hidden_size, language.ffn_hidden_size
    heads = language.num_attention_heads + 2 * language.num_query_groups
    shapes = {
        r"(word_embeddings|output_layer)\.weight": (language.vocab_size, hidden),
        r"(norm|layer_norm)(\.|_)weight": (hidden,),
        r"linear_qkv\.weight": (hidden // language.num_attention_heads * heads, hidden),
        r"linear_proj\.weight": (hidden, hidden),
        r"linear_fc1\.weight": (2 * ffn, hidden),
        r"linear_fc2\.weight": (hidden, ffn),
    }
    return _match(shapes, name)


def vision_shape(vision: VisionConfig, name: str) -> tuple[int, ...]:
    """The same for a name of the vision tower, without its prefix."""
    hidden, ffn, patch = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    positions = vision.num_image_tokens + (vision.family == "clip")  # its class token
    shapes: dict[str, tuple[int, ...]] = {
        r"patch_embedding\.weight": (hidden, 3, patch, patch),
        r"position_embedding\.weight": (positions, hidden),
        r"_proj\.weight": (hidden, hidden),
        r"fc1\.weight": (ffn, hidden),
        r"fc2\.weight": (hidden, ffn),
        r"fc1\.bias": (ffn,),
        r"(norm\d?\.weight|bias|class_embedding)": (hidden,),
    }
    return _match(shapes, name)


def _match(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    return next(shape for pattern, shape in shapes.items() if re.search(pattern + "$", name))
