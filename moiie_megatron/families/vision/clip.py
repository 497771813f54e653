"""CLIP's vision tower: SigLIP's layers behind a norm, with a class token in front of the patches.

Names: transformers, ``modeling_clip.py``.
"""

from __future__ import annotations

from typing import Final

from moiie_megatron.families.family import PixelStatistics, VisionFamily, vision_weights
from moiie_megatron.families.vision import siglip

FAMILY: Final = VisionFamily(
    "clip",
    model_type="clip_vision_model",
    config=siglip.CONFIG,
    weights=vision_weights(
        {
            "embeddings.patch_embedding.weight": ("hidden", 3, "patch", "patch"),
            "embeddings.position_embedding.weight": ("positions", "hidden"),
            "post_layernorm.weight": ("hidden",),
            "post_layernorm.bias": ("hidden",),
            "embeddings.class_embedding": ("hidden",),
            "pre_layrnorm.weight": ("hidden",),  # transformers' spelling
            "pre_layrnorm.bias": ("hidden",),
            **siglip.LAYERS,
        }
    ),
    statistics=PixelStatistics(
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
    image_processor="CLIPImageProcessorPil",
    feature_strategy="default",  # without the first position
    num_class_tokens=1,
    pre_norm="pre_layrnorm",
)
