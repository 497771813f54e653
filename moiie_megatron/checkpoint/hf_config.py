"""Does a Hugging Face ``config.json`` describe the model that a run configures?

Weights of the right shapes can still mean another model (RoPE base, norm epsilon, window), and
would load in silence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, Phi3Config, SiglipVisionConfig

from moiie_megatron.config.schema import LanguageConfig, RopeScaling, VisionConfig

# Settings that a config.json leaves out have the values of these classes.
_CLASSES = {
    "llama": LlamaConfig,
    "phi3": Phi3Config,
    "siglip": SiglipVisionConfig,
    "clip": CLIPVisionConfig,
}

_LANGUAGE = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_VISION = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "activation": "hidden_act",
    "norm_epsilon": "layer_norm_eps",
}

# (our key or what we have built in, our value, their key, their value)
_Pair = tuple[str, Any, str, Any]


def check_language_config(language: LanguageConfig, directory: str | Path) -> None:
    """Compare the run's ``language`` section with a directory's ``config.json``.

    Raises:
        ValueError: No readable ``config.json``, or every difference in one sentence.
    """
    file = Path(directory) / "config.json"
    given = _read(file)
    theirs = _CLASSES[language.family]().to_dict() | given
    if given.get("num_key_value_heads") is None:
        theirs["num_key_value_heads"] = theirs["num_attention_heads"]
    pairs: list[_Pair] = [
        (f"language.{ours}", getattr(language, ours), key, theirs[key])
        for ours, key in _LANGUAGE.items()
    ]
    # transformers 5 puts everything about RoPE into rope_parameters.
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    head_size = language.hidden_size // language.num_attention_heads
    pairs += [
        ("language.rotary_base", language.rotary_base, "rope_theta", theta),
        ("language.rope_scaling", _ours(language.rope_scaling), "rope_scaling", _theirs(rope)),
        ("the built-in partial_rotary_factor", 1.0, "partial_rotary_factor", partial),
        ("the built-in hidden_act", "silu", "hidden_act", theirs["hidden_act"]),
        ("the size of a head", head_size, "head_dim", given.get("head_dim") or head_size),
    ]
    if language.family == "phi3":
        window = theirs["sliding_window"]
        pairs.append(("language.sliding_window", language.sliding_window, "sliding_window", window))
    _refuse_differences(pairs, file)


def check_vision_config(vision: VisionConfig, directory: str | Path) -> None:
    """Compare the run's ``vision`` section with a ``config.json``, or its ``vision_config``.

    Raises:
        ValueError: No readable ``config.json``, or every difference in one sentence.
    """
    file = Path(directory) / "config.json"
    given = _read(file)
    given = given.get("vision_config") or given
    model_type = given.get("model_type", "")
    pairs: list[_Pair] = []
    if not model_type.startswith(vision.family):
        pairs = [("vision.family", vision.family, "model_type", model_type)]
    theirs = _CLASSES[vision.family]().to_dict() | given
    pairs += [
        (f"vision.{ours}", getattr(vision, ours), key, theirs[key]) for ours, key in _VISION.items()
    ]
    _refuse_differences(pairs, file)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): a pretrained model needs its config.json."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object: copy it again.")
    return content


def _ours(scaling: RopeScaling | None) -> dict[str, float] | None:
    return None if scaling is None else {k: float(v) for k, v in scaling.model_dump().items()}


def _theirs(rope: dict[str, Any]) -> Any:
    """Llama-3's scaling in the form of ours; another kind as it is written there."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        return kind
    return {name: float(rope.get(name, 0)) for name in RopeScaling.model_fields}


def _refuse_differences(pairs: list[_Pair], file: Path) -> None:
    different = [pair for pair in pairs if pair[1] != pair[3]]
    if different:
        listed = ", ".join(
            f"{ours} is {value} where {key} is {other}" for ours, value, key, other in different
        )
        raise ValueError(
            f"The configuration does not describe the weights of {file}: {listed}; use the same "
            "values or another pretrained directory."
        )
