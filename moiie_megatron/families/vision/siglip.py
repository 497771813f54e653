"""SigLIP's vision tower, without its pooling head.

Names: transformers, ``modeling_siglip.py``.
"""

from __future__ import annotations

from typing import Final

from moiie_megatron.families.family import PixelStatistics, VisionFamily, vision_weights

CONFIG: Final = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "activation": "hidden_act",
    "norm_epsilon": "layer_norm_eps",
}

LAYERS: Final[dict[str, tuple[str | int, ...]]] = {
    "encoder.layers.*.layer_norm1.weight": ("hidden",),
    "encoder.layers.*.layer_norm1.bias": ("hidden",),
    "encoder.layers.*.layer_norm2.weight": ("hidden",),
    "encoder.layers.*.layer_norm2.bias": ("hidden",),
    "encoder.layers.*.mlp.fc1.weight": ("ffn", "hidden"),
    "encoder.layers.*.mlp.fc1.bias": ("ffn",),
    "encoder.layers.*.mlp.fc2.weight": ("hidden", "ffn"),
    "encoder.layers.*.mlp.fc2.bias": ("hidden",),
    "encoder.layers.*.self_attn.q_proj.weight": ("hidden", "hidden"),
    "encoder.layers.*.self_attn.q_proj.bias": ("hidden",),
    "encoder.layers.*.self_attn.k_proj.weight": ("hidden", "hidden"),
    "encoder.layers.*.self_attn.k_proj.bias": ("hidden",),
    "encoder.layers.*.self_attn.v_proj.weight": ("hidden", "hidden"),
    "encoder.layers.*.self_attn.v_proj.bias": ("hidden",),
    "encoder.layers.*.self_attn.out_proj.weight": ("hidden", "hidden"),
    "encoder.layers.*.self_attn.out_proj.bias": ("hidden",),
}

FAMILY: Final = VisionFamily(
    "siglip",
    model_type="siglip_vision_model",
    config=CONFIG,
    weights=vision_weights(
        {
            "embeddings.patch_embedding.weight": ("hidden", 3, "patch", "patch"),
            "embeddings.position_embedding.weight": ("positions", "hidden"),
            "post_layernorm.weight": ("hidden",),
            "post_layernorm.bias": ("hidden",),
            "embeddings.patch_embedding.bias": ("hidden",),
            **LAYERS,
        }
    ),
    statistics=PixelStatistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    image_processor="SiglipImageProcessorPil",
    feature_strategy="full",
    fixed_config={"vision_use_head": False},
)
