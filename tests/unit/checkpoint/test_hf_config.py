"""A config.json that describes another model than the run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.checkpoint.hf_config import check_language_config, check_vision_config
from moiie_megatron.config.schema import LanguageConfig, RopeScaling, VisionConfig

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
    with pytest.raises(ValueError, match="language.rope_scaling is None where rope_scaling is"):
        check_language_config(_language(), _write(tmp_path, given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "language.hidden_size is 64 where hidden_size is 32"),
        ({"num_hidden_layers": 6}, "language.num_layers is 4 where num_hidden_layers is 6"),
        ({"num_attention_heads": 8}, "language.num_attention_heads is 4 where .* is 8"),
        ({"num_key_value_heads": 4}, "language.num_query_groups is 2 where .* is 4"),
        ({"num_key_value_heads": None}, "language.num_query_groups is 2 where .* is 4"),
        ({"intermediate_size": 64}, "language.ffn_hidden_size is 128 where .* is 64"),
        ({"vocab_size": 300}, "language.vocab_size is 256 where vocab_size is 300"),
        ({"rms_norm_eps": 1e-6}, "language.norm_epsilon is 1e-05 where rms_norm_eps is 1e-06"),
        ({"tie_word_embeddings": True}, "language.tied_embeddings is False where .* is True"),
        ({"rope_theta": 10000.0}, "language.rotary_base is 500000.0 where rope_theta is 10000.0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            "language.rotary_base is 500000.0 where rope_theta is 7.0",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling is None where .* is longrope"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor is 1.0 where .* is 0.75"),
        ({"hidden_act": "gelu"}, "hidden_act is silu where hidden_act is gelu"),
        ({"head_dim": 32}, "the size of a head is 16 where head_dim is 32"),
    ],
)
def test_differences_are_named_with_both_values_and_the_file(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _write(tmp_path, LLAMA | changes)
    with pytest.raises(ValueError, match=message) as caught:
        check_language_config(_language(), tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_settings_left_out_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    given = {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}  # Llama's default is 1e-6
    check_language_config(_language(norm_epsilon=1e-6), _write(tmp_path, given))
    with pytest.raises(ValueError, match="norm_epsilon is 1e-05 where rms_norm_eps is 1e-06"):
        check_language_config(_language(), tmp_path)


def test_phi3_window(tmp_path: Path) -> None:
    language = _language(family="phi3", sliding_window=2047)
    check_language_config(language, _write(tmp_path, LLAMA | {"sliding_window": 2047}))
    with pytest.raises(ValueError, match="sliding_window is 2047 where sliding_window is None"):
        check_language_config(language, _write(tmp_path, LLAMA))


def test_a_vision_section_as_on_the_hub(tmp_path: Path) -> None:
    """The hub's SigLIP files name only what differs from the defaults."""
    hub = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    hub["vision_config"]["image_size"] = 384
    check_vision_config(_vision(), _write(tmp_path, hub))
    with pytest.raises(ValueError, match="vision.num_layers is 6 where num_hidden_layers is 12"):
        check_vision_config(_vision(num_layers=6), tmp_path)


def test_a_vision_model_of_the_other_family(tmp_path: Path) -> None:
    _write(tmp_path, {"model_type": "clip_vision_model", "image_size": 384, "patch_size": 16})
    with pytest.raises(ValueError, match="vision.family is siglip where model_type is clip"):
        check_vision_config(_vision(), tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_no_readable_config(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        check_language_config(_language(), tmp_path)
