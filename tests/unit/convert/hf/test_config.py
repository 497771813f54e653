"""A config.json in the schema's terms; one of another model than the run's is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.config.schema import (
    LanguageConfig,
    LongRope,
    MoEConfig,
    RopeScaling,
    VisionConfig,
)
from moiie_megatron.convert.hf.config import (
    check_language_config,
    check_moe_config,
    check_vision_config,
    read_language_config,
    read_moe_config,
    read_vision_config,
)
from moiie_megatron.families.hf_config import language_to_hf
from tests.helpers.user_errors import user_error

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 128,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _language(**changes: Any) -> LanguageConfig:
    values: dict[str, Any] = {
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "rotary_base": 500000.0,
    }
    return LanguageConfig(**(values | changes))


def _vision(**changes: Any) -> VisionConfig:
    values: dict[str, Any] = {
        "family": "siglip",
        "hidden_size": 768,
        "ffn_hidden_size": 3072,
        "num_layers": 12,
        "num_attention_heads": 12,
        "image_size": 384,
        "patch_size": 16,
        "activation": "gelu_pytorch_tanh",
    }
    return VisionConfig(**(values | changes))


def _write(folder: Path, content: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_the_same_model_in_both_spellings_of_rope(tmp_path: Path) -> None:
    check_language_config(_language(), _write(tmp_path, LLAMA))
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    check_language_config(_language(), _write(tmp_path, new))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_in_both_spellings(key: str, tmp_path: Path) -> None:
    given = LLAMA | {key: {"rope_type": "llama3", **SCALING}}
    if key == "rope_parameters":
        given[key]["rope_theta"] = given.pop("rope_theta")
    check_language_config(_language(rope_scaling=RopeScaling(**SCALING)), _write(tmp_path, given))
    with user_error("language.rope_scaling", "None", "rope_scaling"):
        check_language_config(_language(), _write(tmp_path, given))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": 32}, ("language.hidden_size", "64", "hidden_size", "32")),
        ({"num_hidden_layers": 6}, ("language.num_layers", "4", "num_hidden_layers", "6")),
        ({"num_attention_heads": 8}, ("language.num_attention_heads", "4", "8")),
        ({"num_key_value_heads": 4}, ("language.num_query_groups", "2", "4")),
        ({"num_key_value_heads": None}, ("language.num_query_groups", "2", "4")),
        ({"intermediate_size": 64}, ("language.ffn_hidden_size", "128", "64")),
        ({"vocab_size": 300}, ("language.vocab_size", "256", "vocab_size", "300")),
        ({"rms_norm_eps": 1e-6}, ("language.norm_epsilon", "1e-05", "rms_norm_eps", "1e-06")),
        ({"tie_word_embeddings": True}, ("language.tied_embeddings", "False", "True")),
        ({"rope_theta": 10000.0}, ("language.rotary_base", "500000.0", "rope_theta", "10000.0")),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            ("language.rotary_base", "500000.0", "rope_theta", "7.0"),
        ),
        ({"model_type": "phi3"}, ("language.family", "llama", "model_type", "phi3")),
    ],
)
def test_differences_are_named_with_both_values_and_the_file(
    changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    _write(tmp_path, LLAMA | changes)
    with user_error(tmp_path / "config.json", *parts):
        check_language_config(_language(), tmp_path)


def test_settings_left_out_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    given = {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}  # Llama's default is 1e-6
    check_language_config(_language(norm_epsilon=1e-6), _write(tmp_path, given))
    with user_error("norm_epsilon", "1e-05", "rms_norm_eps", "1e-06"):
        check_language_config(_language(), tmp_path)


def test_a_run_may_use_fewer_positions(tmp_path: Path) -> None:
    check_language_config(_language(max_position_embeddings=64), _write(tmp_path, LLAMA))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gemma3"}, ("model_type", "'gemma3'", "only knows llama, phi3, mixtral")),
        ({"model_type": "mllama"}, ("model_type", "'mllama'")),
        ({"model_type": "qwen3_moe"}, ("model_type", "'qwen3_moe'")),
        ({"model_type": "qwen2_5_vl_text"}, ("model_type", "'qwen2_5_vl_text'")),
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "only knows silu")),
        ({"attention_bias": True}, ("attention_bias", "True")),
        ({"mlp_bias": True}, ("mlp_bias", "True")),
        ({"quantization_config": {"bits": 4}}, ("quantization_config", "{'bits': 4}")),
        ({"partial_rotary_factor": 0.75}, ("partial_rotary_factor", "0.75", "only knows 1.0")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor", "0.5")),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ("rope_type", "'yarn'")),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ("rope_type", "'linear'")),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("without low_freq_factor",)),
        ({"rope_scaling": {"rope_type": "longrope"}}, ("longrope.short_factor", "None")),
        ({"hidden_size": "64"}, ("hidden_size", "'64'", "whole number")),
    ],
)
def test_what_our_model_cannot_be(
    changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    with user_error(tmp_path / "config.json", *parts):
        read_language_config(_write(tmp_path, LLAMA | changes))


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_the_window_of_families_that_have_one(family: str, tmp_path: Path) -> None:
    language = _language(family=family, sliding_window=2047)
    given = LLAMA | {"model_type": family}
    check_language_config(language, _write(tmp_path, given | {"sliding_window": 2047}))
    with user_error("sliding_window", "2047", "None"):
        check_language_config(language, _write(tmp_path, given))


def test_the_reference_names_its_families_in_longer_words(tmp_path: Path) -> None:
    given = LLAMA | {"model_type": "llama_moiie", "tie_word_embeddings": True}
    assert read_language_config(_write(tmp_path, given)) == _language(tied_embeddings=True)


# microsoft/Phi-3-mini-128k-instruct, with fewer factors: 32 times the length, heads of 4 channels
LONGROPE = {"type": "longrope", "short_factor": [1.05, 1.2], "long_factor": [1, 9.5]}
PHI3 = LLAMA | {
    "model_type": "phi3",
    "num_attention_heads": 16,
    "rope_scaling": LONGROPE,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
}


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope(kind: str, tmp_path: Path) -> None:
    given = PHI3 | {"rope_scaling": LONGROPE | {"type": kind}}
    language = read_language_config(_write(tmp_path, given))
    assert language.longrope == LongRope(
        short_factor=[1.05, 1.2],
        long_factor=[1.0, 9.5],
        factor=32.0,
        original_max_position_embeddings=4096,
    )
    # Phi-3's own code: sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5 / 12)
    assert language.longrope.attention_factor == pytest.approx((17 / 12) ** 0.5)
    assert language.sliding_window == 262144
    check_language_config(language, tmp_path)
    with user_error("language.longrope", "None", "rope_scaling", "{'sho"):
        check_language_config(language.model_copy(update={"longrope": None}), tmp_path)


def test_longrope_with_another_attention_factor(tmp_path: Path) -> None:
    rope = LONGROPE | {"attention_factor": (17 / 12) ** 0.5}
    read_language_config(_write(tmp_path, PHI3 | {"rope_scaling": rope}))
    rope["attention_factor"] = 1.5
    with user_error("attention_factor", "1.5", "own, 1.19"):
        read_language_config(_write(tmp_path, PHI3 | {"rope_scaling": rope}))


def test_defaults_of_mixtral_and_its_experts(tmp_path: Path) -> None:
    """Mixtral's RoPE base differs from Llama's."""
    given = {k: v for k, v in LLAMA.items() if k != "rope_theta"} | {"model_type": "mixtral"}
    _write(tmp_path, given | {"num_local_experts": 6})
    assert read_language_config(tmp_path) == _language(family="mixtral", rotary_base=1e6)
    moe = read_moe_config(tmp_path)
    assert moe == MoEConfig(variant="vanilla", num_shared_experts=6, layers="all", top_k=2)
    check_moe_config(moe, tmp_path)
    other = MoEConfig(variant="vanilla", num_shared_experts=4, layers="all", top_k=3)
    with user_error("moe.num_shared_experts", "4", "num_local_experts", "6", "moe.top_k", "3"):
        check_moe_config(other, tmp_path)
    assert read_moe_config(_write(tmp_path, LLAMA)) is None


WINDOW = {"use_sliding_window": True, "sliding_window": 7}
QWEN2 = LLAMA | {"model_type": "qwen2"}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 7, "use_sliding_window": False}, None),
        (WINDOW, None),  # from layer 28 on, of 4
        (WINDOW | {"max_window_layers": 0}, 7),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        (WINDOW | {"layer_types": ["sliding_attention"] * 4}, 7),
        (WINDOW | {"layer_types": ["full_attention"] * 4, "max_window_layers": 0}, None),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_must_be_switched_on(
    family: str, changes: dict[str, Any], window: int | None, tmp_path: Path
) -> None:
    given = QWEN2 | {"model_type": family, "head_dim": 16} | changes
    language = read_language_config(_write(tmp_path, given))
    assert language == _language(
        family=family,
        sliding_window=window,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )
    kept = language_to_hf(language)
    assert (kept.sliding_window, set(kept.layer_types)) == (
        window,
        {"full_attention" if window is None else "sliding_attention"},
    )


def test_a_window_in_some_of_the_layers(tmp_path: Path) -> None:
    _write(tmp_path, QWEN2 | WINDOW | {"max_window_layers": 3})
    with user_error("max_window_layers", "3", "1 of 4 layers"):
        read_language_config(tmp_path)


def test_heads_of_another_size(tmp_path: Path) -> None:
    """What a family's configuration leaves out has the family's default."""
    language = read_language_config(_write(tmp_path, LLAMA | {"model_type": "qwen3"}))
    assert (language.head_dim, language.head_size) == (128, 128)
    language = read_language_config(_write(tmp_path, LLAMA | {"head_dim": 24}))
    assert (language.head_dim, language.head_size) == (24, 24)
    with user_error("language.head_dim", "16", "head_dim", "24"):
        check_language_config(_language(), tmp_path)
    # The usual size may be spelled out on either side.
    check_language_config(_language(head_dim=16), _write(tmp_path, LLAMA))
    check_language_config(_language(), _write(tmp_path, LLAMA | {"head_dim": 16}))


def test_defaults_of_mistral(tmp_path: Path) -> None:
    given = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    _write(tmp_path, given | {"model_type": "mistral", "num_attention_heads": 8})
    language = read_language_config(tmp_path)
    assert (language.sliding_window, language.num_query_groups) == (4096, 8)
    _write(tmp_path, given | {"model_type": "mistral", "sliding_window": None})
    assert read_language_config(tmp_path).sliding_window is None


def test_both_halves_of_a_composed_model(tmp_path: Path) -> None:
    """As LLaVA has them on the hub: each half names only what differs from its defaults."""
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    given = {
        "model_type": "llava",
        "text_config": LLAMA,
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    _write(tmp_path, given)
    assert read_language_config(tmp_path) == _language()
    clip = read_vision_config(tmp_path)
    assert (clip.family, clip.activation, clip.norm_epsilon) == ("clip", "quick_gelu", 1e-5)
    assert (clip.num_image_tokens, clip.feature_layer) == (576, -2)
    _write(tmp_path, given | {"tie_word_embeddings": True})
    assert read_language_config(tmp_path).tied_embeddings
    # hidden_states[11] of 12 layers, with the embeddings as 0, is the last but one of 13
    _write(tmp_path, given | {"vision_feature_layer": 11})
    assert read_vision_config(tmp_path).feature_layer == -2
    _write(tmp_path, given | {"vision_feature_layer": [-2, -5]})
    with user_error("feature_layer", "[-2, -5]"):
        read_vision_config(tmp_path)
    _write(tmp_path, given | {"vision_feature_select_strategy": "full"})
    with user_error("vision_feature_select_strategy", "'full'"):
        read_vision_config(tmp_path)


def test_a_vision_section_as_on_the_hub(tmp_path: Path) -> None:
    """The hub's SigLIP files name only what differs from the defaults."""
    hub = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    hub["vision_config"]["image_size"] = 384
    check_vision_config(_vision(), _write(tmp_path, hub))
    with user_error("vision.num_layers", "6", "num_hidden_layers", "12"):
        check_vision_config(_vision(num_layers=6), tmp_path)


def test_a_vision_model_of_the_other_family(tmp_path: Path) -> None:
    _write(tmp_path, {"model_type": "clip_vision_model", "image_size": 384, "patch_size": 16})
    with user_error("vision.family", "siglip", "model_type", "clip"):
        check_vision_config(_vision(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "siglip2_vision_model"}, ("model_type", "'siglip2_", "siglip or clip")),
        ({"hidden_act": "relu"}, ("activation", "'relu'", "gelu_pytorch_tanh, quick_gelu or gelu")),
        ({"num_channels": 1}, ("num_channels", "1", "only knows 3")),
    ],
)
def test_what_our_vision_encoder_cannot_be(
    changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    _write(tmp_path, {"model_type": "siglip_vision_model", **changes})
    with user_error(tmp_path / "config.json", *parts):
        read_vision_config(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_no_readable_config(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with user_error(tmp_path / "config.json"):
        check_language_config(_language(), tmp_path)
