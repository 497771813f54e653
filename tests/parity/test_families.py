"""Every family through its own config.json: read, build, load, and give what transformers gives.

Nothing about a model is written down twice: our sections come from the directory alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from moiie_megatron.config.families import LANGUAGE_FAMILIES
from moiie_megatron.config.schema import MoEConfig, RunConfig
from moiie_megatron.convert.hf.config import (
    read_language_config,
    read_moe_config,
    read_vision_config,
)
from moiie_megatron.convert.load_pretrained import load_pretrained
from moiie_megatron.families.registry import language_family
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.model import MoIIEModel
from tests.helpers.user_errors import user_error
from tests.parity import hf_models, tiny

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 16.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0],
}
LLAMA31_ROPE = LLAMA3_ROPE | {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE_MODEL = {
    "rope_parameters": LONGROPE,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 16,
}
# name: (family, changes to transformers' configuration)
LANGUAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA31_ROPE}),
    "llama-3.1-other-constants": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE | {"factor": 2.0}}),
    "phi3": ("phi3", {}),
    "phi3-gqa": ("phi3", {"num_key_value_heads": 2}),
    "phi3-window": ("phi3", {"sliding_window": 5}),
    "phi3-longrope": ("phi3", LONGROPE_MODEL),
    "phi3-longrope-window": ("phi3", LONGROPE_MODEL | {"sliding_window": 9}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5, "head_dim": 32}),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),  # its heads have 128 channels
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "mixtral-window-top3": ("mixtral", {"sliding_window": 5, "num_experts_per_tok": 3}),
}


def _loaded(
    directory: Path, context: ParallelContext, **changes: Any
) -> tuple[MoIIEModel, RunConfig]:
    """Our model of a directory with a language model."""
    language = read_language_config(directory)
    language = language.model_copy(update={"pretrained": str(directory)})
    config = tiny.run_config(language, read_moe_config(directory), **changes)
    model = tiny.build(config, context).eval()
    return model, config


def _logits(model: MoIIEModel, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, torch.zeros_like(tokens, dtype=torch.int8))


def _assert_same_logits(model: MoIIEModel, hf: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        want = hf(tokens).logits
    assert want.abs().max() > 1
    torch.testing.assert_close(_logits(model, tokens), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGES)
def test_language_models(name: str, context: ParallelContext, tmp_path: Path) -> None:
    family, changes = LANGUAGES[name]
    hf = hf_models.language_model(family, **changes)
    # Small files on purpose: the index and several shards are read too.
    hf.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, config = _loaded(tmp_path, context)
    left = load_pretrained(model, config)
    assert not [key for key in left if key.startswith("language_model.")]
    tokens = tiny.random_batch(seed=1)[0]
    # 24 positions are more than the 16 that LongRoPE's models know, 16 are not.
    for length in (24, 16):
        _assert_same_logits(model, hf, tokens[:, :length])


VARIANTS = ("vanilla", "modality", "moiie")
DENSE = [name for name in LANGUAGE_FAMILIES if not language_family(name).has_experts]


@pytest.mark.parametrize("family", DENSE)
def test_every_variant_starts_as_the_dense_model(
    family: str, context: ParallelContext, tmp_path: Path
) -> None:
    """Every expert is a copy of the layer's FFN, so the fresh routers do not matter."""
    hf = hf_models.language_model(family)
    hf.save_pretrained(tmp_path)
    language = read_language_config(tmp_path).model_copy(update={"pretrained": str(tmp_path)})
    for variant in VARIANTS:
        config = tiny.run_config(language, MoEConfig(variant=variant, router_init_std=0.3))
        model = tiny.build(config, context).eval()
        left = [n for n in load_pretrained(model, config) if n.startswith("language_model.")]
        assert len(left) == len(config.moe_layers) * len(config.moe.layout.routers)
        _assert_same_logits(model, hf, tiny.random_batch(seed=4)[0])


def test_longrope_has_two_sets_of_frequencies(context: ParallelContext, tmp_path: Path) -> None:
    """That both branches run above: the first positions differ with what comes after them."""
    hf_models.language_model("phi3", **LONGROPE_MODEL).save_pretrained(tmp_path)
    model, config = _loaded(tmp_path, context)
    load_pretrained(model, config)
    tokens = tiny.random_batch(seed=1)[0]
    short = _logits(model, tokens[:, :16])
    assert (_logits(model, tokens[:, :17])[:, :16] - short).abs().max() > 1e-2
    torch.testing.assert_close(_logits(model, tokens[:, :12]), short[:, :12], rtol=1e-4, atol=1e-4)


def test_mixtral_as_its_modules_name_it(context: ParallelContext, tmp_path: Path) -> None:
    """transformers 5 keeps experts in one tensor and can also write it so."""
    hf = hf_models.language_model("mixtral", num_local_experts=6)
    hf.save_pretrained(tmp_path, save_original_format=False)
    model, config = _loaded(tmp_path, context)
    load_pretrained(model, config)
    _assert_same_logits(model, hf, tiny.random_batch(seed=2)[0])


def test_mixtral_with_other_experts_than_the_run(context: ParallelContext, tmp_path: Path) -> None:
    hf_models.language_model("mixtral", num_local_experts=6).save_pretrained(tmp_path)
    model, config = _loaded(tmp_path, context)
    moe = config.moe.model_copy(update={"top_k": 3})
    with user_error("moe.top_k", "3", "num_experts_per_tok", "2"):
        load_pretrained(model, config.model_copy(update={"moe": moe}))


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {k: v for k, v in TOWER.items() if k not in ("image_size", "patch_size")}
TEXT |= {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _tower(name: str) -> PreTrainedModel:
    siglip = TOWER | {"hidden_act": "gelu", "layer_norm_eps": 1e-4}
    if name == "siglip":
        model: Any = SiglipVisionModel(SiglipVisionConfig(**siglip))
    elif name == "siglip-with-text":
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=siglip))
    elif name == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    else:
        model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=TOWER))
    _randomise(model)
    return model.eval()


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2, generator=generator)
        elif parameter.dim() == 1:
            parameter.uniform_(0.2, 1.0, generator=generator)


def _assert_same_features(model: MoIIEModel, tower: Any) -> None:
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = tower(images, output_hidden_states=True).hidden_states[-2]
        got = model.vision_encoder(images)
    torch.testing.assert_close(got, want[:, -16:], rtol=1e-4, atol=1e-4)  # CLIP's class token


@pytest.mark.parametrize("name", ["siglip", "siglip-with-text", "clip", "clip-with-text"])
def test_vision_towers(name: str, context: ParallelContext, tmp_path: Path) -> None:
    """A tower by itself is flat on disk, one beside a text tower has a prefix."""
    hf = _tower(name)
    hf.save_pretrained(tmp_path)
    vision = read_vision_config(tmp_path).model_copy(update={"pretrained": str(tmp_path)})
    config = tiny.run_config(tiny.language("llama", num_layers=2), vision_config=vision)
    model = tiny.build(config, context).eval()
    left = load_pretrained(model, config)
    assert not [key for key in left if key.startswith("vision_encoder.")]
    _assert_same_features(model, getattr(hf, "vision_model", hf))


@pytest.mark.parametrize("as_on_the_hub", [True, False])
def test_a_composed_model(as_on_the_hub: bool, context: ParallelContext, tmp_path: Path) -> None:
    """LLaVA in both of its layouts: language model, vision tower and connector out of one
    directory, checked as a whole on a prompt with an image."""
    text = hf_models.language_model("llama").config.to_dict()
    vision = TOWER | {"model_type": "clip_vision_model"}
    torch.manual_seed(7)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=255)
    hf = LlavaForConditionalGeneration(config).eval()
    _randomise(hf)
    hf.save_pretrained(tmp_path, save_original_format=as_on_the_hub)
    section = read_vision_config(tmp_path).model_copy(update={"pretrained": str(tmp_path)})
    model, run = _loaded(tmp_path, context, vision_config=section)
    assert load_pretrained(model, run) == []
    tokens, _, types, _ = tiny.random_batch(seed=3, vocabulary=255)
    tokens, types = tokens[:1, :20].clone(), torch.zeros(1, 20, dtype=torch.int8)
    tokens[0, 2:18], types[0, 2:18] = 255, 1
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        want = hf(input_ids=tokens, pixel_values=image).logits
        got = model(tokens, torch.arange(20).unsqueeze(0), types, images=image)
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
