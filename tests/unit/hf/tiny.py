"""Tiny exported models, their tokenizer and their inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moiie_megatron.config.schema import VisionConfig
from moiie_megatron.hf.build_processor import build_processor
from moiie_megatron.hf.configuration_moiie import MoiieConfig
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.hf.processing_moiie import MoiieProcessor

VOCABULARY = 272  # 256 bytes, the markers below, room for the image token and padding rows
MARKERS = ("<s>", "</s>")
IMAGE_TOKENS = 16  # 28 / 7 squared
# Changes to a text config.  Beyond 30 positions other frequencies hold (8 of them: head size 16).
LONGROPE = {
    "original_max_position_embeddings": 30,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
    },
}
LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}


def text(family: str, **changes: Any) -> dict[str, Any]:
    values = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if family == "llama" else 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        # Large, so that the most likely token does not hang on rounding.
        "initializer_range": 0.2,
    }
    return copy.deepcopy(values | changes)  # transformers adds to rope_parameters


def vision(family: str) -> dict[str, Any]:
    return {
        "model_type": f"{family}_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "hidden_act": "gelu_pytorch_tanh" if family == "siglip" else "quick_gelu",
    }


def config(family: str = "llama", vision_family: str = "siglip", **changes: Any) -> MoiieConfig:
    """Four experts (1 vision, 2 shared, 1 text) in layers 1 and 3."""
    text_changes = changes.pop("text_config", {})
    values = {
        "text_config": text(family, **text_changes),
        "vision_config": vision(vision_family),
        "experts": {"vision": 1, "shared": 2, "text": 1},
        "moe_layers": [1, 3],
        "image_token_id": 258,
        "connector_hidden_size": 40,
    }
    return MoiieConfig(**(values | changes))


def model(config: MoiieConfig, seed: int = 0) -> MoiieForConditionalGeneration:
    torch.manual_seed(seed)
    return MoiieForConditionalGeneration(config).eval()


def tokenizer_directory(folder: Path) -> Path:
    """Every byte is a token; no image token and no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(MARKERS))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def processor(
    folder: Path, vision_family: str = "siglip", image_mode: str = "square"
) -> MoiieProcessor:
    values = vision(vision_family)
    section = VisionConfig(
        family=vision_family,
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        activation=values["hidden_act"],
    )
    return build_processor(tokenizer_directory(folder / "tokenizer"), section, image_mode)


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def greedy(model: MoiieForConditionalGeneration, inputs: dict[str, Tensor], steps: int) -> Tensor:
    """New ids by whole forward passes: no cache, nothing of ``generate``."""
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    assert ids.shape[0] == 1
    for _ in range(steps):
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                mm_token_type_ids=types,
                pixel_values=inputs.get("pixel_values"),
                use_cache=False,
            ).logits
        new = logits[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, new], dim=1)
        types = torch.cat([types, torch.zeros_like(new)], dim=1)
    return ids[:, -steps:]
