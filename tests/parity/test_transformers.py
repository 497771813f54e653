"""Loaded Hugging Face weights give what transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from moiie_megatron.backend.parallel import World
from moiie_megatron.checkpoint.from_hf import load_pretrained
from moiie_megatron.config.schema import RopeScaling
from tests.parity import tiny

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# (family, changes to our section, changes to transformers' configuration)
LANGUAGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-gqa": ("llama", {}, {}),
    "llama-mha": ("llama", {"num_query_groups": 4}, {"num_key_value_heads": 4}),
    "llama-tied": ("llama", {"tied_embeddings": True}, {"tie_word_embeddings": True}),
    "llama-3.1-rope": (
        "llama",
        {"rope_scaling": RopeScaling(**LLAMA3_ROPE)},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE}},
    ),
    "phi3": ("phi3", {}, {}),
    "phi3-gqa": ("phi3", {"num_query_groups": 2}, {"num_key_value_heads": 2}),
    "phi3-window": ("phi3", {"sliding_window": 5}, {"sliding_window": 5}),
}


def _hf_language(family: str, changes: dict[str, Any]) -> PreTrainedModel:
    values: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if family == "llama" else 4,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0 if family == "llama" else 10000.0,
        },
        "pad_token_id": 0,
        "initializer_range": 0.2,  # far from linear: a wrong layout shows
    }
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "phi3": (Phi3Config, Phi3ForCausalLM)}
    config_class, model_class = classes[family]
    torch.manual_seed(5)
    model = model_class(config_class(**(values | changes))).eval()
    _randomise_norms(model)
    return model


def _randomise_norms(model: torch.nn.Module) -> None:
    """Fresh norms are all alike, which would hide that two were swapped."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


@pytest.mark.parametrize("name", LANGUAGES)
def test_language_model(name: str, world: World, tmp_path: Path) -> None:
    family, ours, theirs = LANGUAGES[name]
    hf = _hf_language(family, theirs)
    # Small files on purpose: the index and several shards are read too.
    hf.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    config = tiny.run_config(tiny.language(family, pretrained=str(tmp_path), **ours))
    model = tiny.build(config, world).eval()
    load_pretrained(model, config)
    tokens, positions, _, _ = tiny.random_batch(seed=1)
    with torch.no_grad():
        want = hf(tokens).logits
        got = model(tokens, positions, torch.zeros_like(tokens, dtype=torch.int8))
    assert want.abs().max() > 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _hf_vision(name: str) -> PreTrainedModel:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
    }
    text = {k: v for k, v in sizes.items() if k not in ("image_size", "patch_size")}
    text |= {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(6)
    models: dict[str, Any] = {
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**sizes)),
        "siglip-with-text": lambda: SiglipModel(
            SiglipConfig(text_config=text, vision_config=sizes)
        ),
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**sizes)),
        "clip-with-text": lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=sizes)),
    }
    model = models[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.2, 1.0)
    return model


@pytest.mark.parametrize("name", ["siglip", "siglip-with-text", "clip", "clip-with-text"])
def test_vision_encoder(name: str, world: World, tmp_path: Path) -> None:
    hf, family = _hf_vision(name), name.split("-")[0]
    hf.save_pretrained(tmp_path)
    section = tiny.vision(family, pretrained=str(tmp_path))
    config = tiny.run_config(tiny.language("llama", num_layers=2), vision_config=section)
    model = tiny.build(config, world).eval()
    left = load_pretrained(model, config)
    assert not [key for key in left if key.startswith("vision_encoder.")]
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    tower = getattr(hf, "vision_model", hf)
    with torch.no_grad():
        want = tower(images, output_hidden_states=True).hidden_states[-2]
        got = model.vision_encoder(images)
    want = want[:, 1:] if family == "clip" else want  # without CLIP's class token
    assert got.shape == (2, section.num_image_tokens, 32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
