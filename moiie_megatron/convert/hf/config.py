"""What a Hugging Face ``config.json`` describes, in the terms of the configuration.

The file may be that of a language model or a vision model alone, or of a composed model
(``text_config``, ``vision_config``).  Weights of the right shapes can still mean another model
(RoPE base, norm epsilon, window) and would load in silence: what our model cannot express is
refused, and so is a run that configures another model than the file describes.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    SiglipVisionConfig,
)

from moiie_megatron.config.messages import first_problem, listed, show
from moiie_megatron.config.schema import LanguageConfig, MoEConfig, Section, VisionConfig
from moiie_megatron.utils.errors import UserError

# Settings that a config.json leaves out have the values of these classes.
_LANGUAGE_CLASSES = {"llama": LlamaConfig, "phi3": Phi3Config, "mixtral": MixtralConfig}
_VISION_CLASSES = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}

# Our keys and theirs.
_LANGUAGE = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "rotary_base": "rope_theta",
    "rope_scaling": "rope_scaling",
    "longrope": "rope_scaling",
    "sliding_window": "sliding_window",
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
_MOE = {"num_shared_experts": "num_local_experts", "top_k": "num_experts_per_tok"}

# What our language model has built in.
_BUILT_IN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
# A run may use fewer positions than the model has.
_FREE = ("max_position_embeddings",)

_SectionT = TypeVar("_SectionT", bound=Section)


def read_language_config(directory: str | Path) -> LanguageConfig:
    """The language model of a directory's ``config.json``.

    The family is the word in ``model_type`` that names one, so that ``llama_moiie`` is a llama;
    experts are no part of this section (``read_moe_config``).

    Raises:
        UserError: No readable ``config.json``, or a model that ours cannot be.
    """
    file, given = read_config(directory)
    section = _subsection(given, "text_config")
    family = _language_family(section, file)
    theirs = _LANGUAGE_CLASSES[family]().to_dict() | section
    for key, value in _BUILT_IN.items():
        if section.get(key, value) not in (value, None):
            raise _unknown(file, key, section[key], value)
    rope = section.get("rope_scaling") or section.get("rope_parameters") or {}
    heads = theirs["num_attention_heads"]
    values = {ours: theirs[key] for ours, key in _LANGUAGE.items() if key in theirs}
    values |= {
        "family": family,
        # transformers takes either in composed models (LlavaConfig).
        "tied_embeddings": theirs["tie_word_embeddings"] or bool(given.get("tie_word_embeddings")),
        "num_query_groups": section.get("num_key_value_heads") or heads,
        "sliding_window": None if family == "llama" else theirs["sliding_window"],
        **_rope(family, theirs, section, rope, file),
    }
    language = _section(LanguageConfig, values, file)
    head_size = section.get("head_dim") or language.hidden_size // heads
    if head_size * heads != language.hidden_size:
        raise _unknown(file, "head_dim", head_size, f"{language.hidden_size} / {heads} heads")
    if language.longrope is not None:
        usual, factor = language.longrope.attention_factor, rope.get("attention_factor")
        if factor is not None and not math.isclose(factor, usual, rel_tol=1e-6):
            raise _unknown(file, "attention_factor", factor, f"LongRoPE's own, {usual}")
    return language


def read_moe_config(directory: str | Path) -> MoEConfig | None:
    """The experts that come with a pretrained language model: Mixtral's, as Vanilla MoE.

    Returns:
        None for a dense family.

    Raises:
        UserError: As ``read_language_config``, or numbers of experts that cannot be.
    """
    file, given = read_config(directory)
    section = _subsection(given, "text_config")
    if _language_family(section, file) != "mixtral":
        return None
    theirs = MixtralConfig().to_dict() | section
    values: dict[str, Any] = {ours: theirs[key] for ours, key in _MOE.items()}
    moe = _section(MoEConfig, {"variant": "vanilla", "layers": "all", **values}, file)
    _ = moe.layout  # refuses more experts per token than there are
    return moe


def read_vision_config(directory: str | Path) -> VisionConfig:
    """The vision tower of a directory's ``config.json``.

    Raises:
        UserError: No readable ``config.json``, or a model that ours cannot be.
    """
    file, given = read_config(directory)
    section = _subsection(given, "vision_config")
    model_type = section.get("model_type", "")
    family = re.sub("_vision_model$", "", model_type)
    if family not in _VISION_CLASSES:
        raise _unknown(file, "model_type", model_type, listed(_VISION_CLASSES))
    theirs = _VISION_CLASSES[family]().to_dict() | section
    if theirs["num_channels"] != 3:
        raise _unknown(file, "num_channels", theirs["num_channels"], 3)
    values = {ours: theirs[key] for ours, key in _VISION.items()}
    layer = given.get("vision_feature_layer")
    if layer is not None:
        if isinstance(layer, int) and layer >= 0:  # transformers counts the embeddings as 0
            layer -= theirs["num_hidden_layers"] + 1
        values["feature_layer"] = layer
    # LLaVA's "default" leaves out the first position; our CLIP does, SigLIP has no class token.
    strategy, ours = given.get("vision_feature_select_strategy"), {"siglip": "full"}
    if strategy not in (None, ours.get(family, "default")):
        raise _unknown(
            file, "vision_feature_select_strategy", strategy, ours.get(family, "default")
        )
    return _section(VisionConfig, {"family": family, **values}, file)


def check_language_config(language: LanguageConfig, directory: str | Path) -> None:
    """Compare the run's ``language`` section with a directory's ``config.json``.

    Raises:
        UserError: As ``read_language_config``, or every difference in one sentence.
    """
    theirs = read_language_config(directory)
    _refuse_differences("language", language, theirs, _LANGUAGE, directory)


def check_moe_config(moe: MoEConfig, directory: str | Path) -> None:
    """Compare the run's ``moe`` section with the experts of a directory's ``config.json``.

    Raises:
        UserError: As ``read_moe_config``, or every difference in one sentence.
    """
    theirs = read_moe_config(directory)
    if theirs is not None:
        given = moe.model_copy(update={"num_shared_experts": moe.layout.num_shared})
        _refuse_differences("moe", given, theirs, _MOE, directory)


def check_vision_config(vision: VisionConfig, directory: str | Path) -> None:
    """Compare the run's ``vision`` section with a ``config.json``, or its ``vision_config``.

    The feature layer is the run's own choice.

    Raises:
        UserError: As ``read_vision_config``, or every difference in one sentence.
    """
    theirs = read_vision_config(directory)
    _refuse_differences("vision", vision, theirs, _VISION, directory)


def _rope(
    family: str, theirs: dict[str, Any], section: dict[str, Any], rope: dict[str, Any], file: Path
) -> dict[str, Any]:
    """Our keys about RoPE.

    Args:
        theirs: The section with defaults filled in.
        section: What the file says.
        rope: Its ``rope_scaling``, or ``rope_parameters``, where transformers 5 puts all of it.
    """
    default_theta = _LANGUAGE_CLASSES[family]().to_dict()["rope_parameters"]["rope_theta"]
    base = rope.get("rope_theta") or section.get("rope_theta") or default_theta
    partial = rope.get("partial_rotary_factor", section.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise _unknown(file, "partial_rotary_factor", partial, 1.0)
    values: dict[str, Any] = {"rotary_base": float(base), "rope_scaling": None, "longrope": None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    positions = theirs["max_position_embeddings"]
    # The same order as in transformers: beside the others (Phi-3), among them (Llama-3.1).
    original = theirs.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", positions
    )
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        missing = [key for key in keys if key not in rope]
        if missing:
            raise UserError(f"{file} has rope_scaling without {missing[0]}: copy it again.")
        values["rope_scaling"] = {key: rope[key] for key in keys} | {
            "original_max_position_embeddings": original
        }
    elif kind == "longrope" or (kind == "su" and family == "phi3"):  # Phi-3's first name for it
        values["longrope"] = {
            "short_factor": rope.get("short_factor"),
            "long_factor": rope.get("long_factor"),
            "factor": rope.get("factor") or positions / original,
            "original_max_position_embeddings": original,
        }
    elif kind != "default":
        raise _unknown(file, "rope_type", kind, "default, llama3 or longrope")
    return values


def read_config(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file ``config.json`` of a directory and what it holds.

    Raises:
        UserError: It is missing or no JSON object.
    """
    file = Path(directory) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): a pretrained model needs its config.json."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: copy it again.")
    return file, content


def _subsection(given: dict[str, Any], name: str) -> dict[str, Any]:
    section = given.get(name) or given
    return section if isinstance(section, dict) else given


def _language_family(section: dict[str, Any], file: Path) -> str:
    model_type = str(section.get("model_type", ""))
    families = [word for word in re.split("[-_]", model_type) if word in _LANGUAGE_CLASSES]
    if len(families) != 1:
        raise _unknown(file, "model_type", model_type, listed(_LANGUAGE_CLASSES))
    return families[0]


def _section(kind: type[_SectionT], values: dict[str, Any], file: Path) -> _SectionT:
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(f"{file} does not describe a model: {first_problem(error, kind)}") from None


def _unknown(file: Path, key: str, value: Any, known: object) -> UserError:
    return UserError(
        f"{key} is {show(value)} in {file}, but the model here only knows {known}: use weights of "
        "a supported architecture."
    )


def _refuse_differences(
    name: str, ours: Section, theirs: Section, keys: dict[str, str], directory: str | Path
) -> None:
    """Compare two sections at the given keys, and their families."""
    keys = {"family": "model_type", **keys} if "family" in type(ours).model_fields else keys
    different = [
        f"{name}.{our_key} is {_shown(ours, our_key)} where {their_key} is "
        f"{_shown(theirs, our_key)}"
        for our_key, their_key in keys.items()
        if our_key not in _FREE and getattr(ours, our_key) != getattr(theirs, our_key)
    ]
    if different:
        raise UserError(
            f"The configuration does not describe the weights of {Path(directory) / 'config.json'}"
            f": {', '.join(different)}; use the same values or another pretrained directory."
        )


def _shown(section: Section, key: str) -> Any:
    value = getattr(section, key)
    return value.model_dump() if isinstance(value, Section) else value
