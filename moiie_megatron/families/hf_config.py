"""A ``config.json`` in the terms of the configuration, and back: what all families share.

What our model cannot express is refused: weights of the right shapes can still mean another model
(RoPE base, norm epsilon, window) and would load in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import ValidationError

from moiie_megatron.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from moiie_megatron.config.messages import first_problem, listed, show
from moiie_megatron.config.schema import LanguageConfig, MoEConfig, Section, VisionConfig
from moiie_megatron.config.section import MAX_FLOAT, MAX_INT
from moiie_megatron.families.family import LanguageFamily, UnsupportedError, VisionFamily
from moiie_megatron.families.registry import language_family, vision_family
from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What our language model has built in.
_BUILT_IN: Final = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
# Read and written by functions of their own.
_ROPE_FIELDS: Final = ("rotary_base", "rope_scaling", "longrope")
_FIELDS_WITH_A_RULE: Final = (*_ROPE_FIELDS, "head_dim", "tied_embeddings")
# Settings that transformers' configurations compute where they are left out.
_COMPUTED: Final = ("head_dim", "num_key_value_heads", "sliding_window", "layer_types")

# What is computed with before the schema has checked it.
_COUNTS: Final = ("num_hidden_layers", "max_position_embeddings", "max_window_layers")
_TYPES: Final = {
    **dict.fromkeys((*_COUNTS, "original_max_position_embeddings"), "a whole number"),
    **dict.fromkeys(("rope_theta", "factor", "attention_factor"), "a number"),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), "an object"),
    "layer_types": "a list",
}

_SectionT = TypeVar("_SectionT", bound=Section)


def find_language_family(section: Mapping[str, Any], file: Path) -> LanguageFamily:
    """The family of a language model's section.

    It is the word in ``model_type`` that names one, so that ``llama_moiie`` is a llama; but not
    where transformers has another model of that name (``..._moe``).

    Raises:
        UserError: No family, or several.
    """
    from transformers import CONFIG_MAPPING

    model_type = str(section.get("model_type", ""))
    names = [word for word in re.split("[-_]", model_type) if word in LANGUAGE_FAMILIES]
    is_other = model_type in CONFIG_MAPPING and model_type not in LANGUAGE_FAMILIES
    if len(names) != 1 or is_other:
        raise _unknown(file, "model_type", model_type, listed(LANGUAGE_FAMILIES))
    return language_family(names[0])


def language_from_hf(section: Mapping[str, Any], file: Path, *, is_tied: bool) -> LanguageConfig:
    """The language model that a section of a ``config.json`` describes.

    Args:
        section: The file's content, or its ``text_config``.
        file: For messages.
        is_tied: The file ties the embeddings outside the section.

    Raises:
        UserError: A model that ours cannot be.
    """
    family = find_language_family(section, file)
    theirs = _with_defaults(family.name, section)
    _check_types(theirs, file)
    try:
        for key, value in _BUILT_IN.items():
            if section.get(key, value) not in (value, None):
                raise UnsupportedError(key, section[key], value)
        rope = section.get("rope_scaling") or section.get("rope_parameters") or {}
        _check_types(rope, file)
        values = {
            ours: theirs[key]
            for ours, key in family.config.items()
            if ours not in _FIELDS_WITH_A_RULE and key in theirs
        }
        values |= {
            "family": family.name,
            "tied_embeddings": theirs["tie_word_embeddings"] or is_tied,
            "num_query_groups": theirs["num_key_value_heads"] or theirs["num_attention_heads"],
            "head_dim": _read_head_dim(theirs),
            **family.fixed,
            **_read_rope(family, theirs, section, rope, file),
            **(family.read(theirs) if family.read is not None else {}),
        }
        language = _section(LanguageConfig, values, file)
        if language.longrope is not None:
            usual, factor = language.longrope.attention_factor, rope.get("attention_factor")
            if factor is not None and not math.isclose(factor, usual, rel_tol=1e-6):
                raise UnsupportedError("attention_factor", factor, f"LongRoPE's own, {usual}")
    except UnsupportedError as error:
        raise _unknown(file, error.key, error.value, error.known) from None
    return language


def experts_from_hf(section: Mapping[str, Any], file: Path) -> MoEConfig | None:
    """The experts that come with a pretrained language model; None for a dense family.

    Raises:
        UserError: As ``language_from_hf``, or numbers of experts that cannot be.
    """
    family = find_language_family(section, file)
    if not family.has_experts:
        return None
    theirs = _with_defaults(family.name, section)
    values: dict[str, Any] = {ours: theirs[key] for ours, key in family.expert_config.items()}
    moe = _section(MoEConfig, {"variant": "vanilla", "layers": "all", **values}, file)
    _ = moe.layout  # refuses more experts per token than there are
    return moe


def language_to_hf(
    language: LanguageConfig, token_ids: Mapping[str, int | None] | None = None
) -> PreTrainedConfig:
    """The decoder as a transformers configuration: the inverse of ``language_from_hf``.

    Raises:
        UserError: A sliding window in a family that has none in transformers.
    """
    from transformers import CONFIG_MAPPING

    family = language_family(language.family)
    values: dict[str, Any] = {
        key: getattr(language, ours)
        for ours, key in family.config.items()
        if ours not in (*_ROPE_FIELDS, "head_dim")
    }
    values |= token_ids or {}
    rope: dict[str, Any] = {"rope_type": "default"}
    if language.rope_scaling is not None:
        rope = {"rope_type": "llama3", **language.rope_scaling.model_dump()}
    if language.longrope is not None:
        rope = {"rope_type": "longrope", **language.longrope.model_dump()}
        values["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    values["rope_parameters"] = rope | {"rope_theta": language.rotary_base}
    kind = CONFIG_MAPPING[family.exported_as or family.name]
    if language.head_dim is not None or hasattr(kind, "head_dim"):
        values["head_dim"] = language.head_size
    if language.sliding_window is not None and "sliding_window" not in family.config:
        raise UserError(
            f"language.sliding_window is {language.sliding_window}, but the exported "
            f"{family.name} model has none: export a model without."
        )
    values |= family.write(language) if family.write is not None else {}
    return kind(**values)


def find_vision_family(section: Mapping[str, Any], file: Path) -> VisionFamily:
    """The family of a vision tower's section.

    Raises:
        UserError: No family.
    """
    model_type = section.get("model_type", "")
    families = [vision_family(name) for name in VISION_FAMILIES]
    for family in families:
        if model_type in (family.name, family.model_type):
            return family
    raise _unknown(file, "model_type", model_type, listed(VISION_FAMILIES))


def vision_from_hf(
    section: Mapping[str, Any], file: Path, given: Mapping[str, Any]
) -> VisionConfig:
    """The vision tower that a section of a ``config.json`` describes.

    Args:
        section: The file's content, or its ``vision_config``.
        file: For messages.
        given: The file's content: a composed model says there which features it takes.

    Raises:
        UserError: A model that ours cannot be.
    """
    family = find_vision_family(section, file)
    theirs = _with_defaults(family.model_type, section)
    _check_types(theirs, file)
    if theirs["num_channels"] != 3:
        raise _unknown(file, "num_channels", theirs["num_channels"], 3)
    values = {"family": family.name} | {ours: theirs[key] for ours, key in family.config.items()}
    layer = given.get("vision_feature_layer")
    if layer is not None:
        if isinstance(layer, int) and layer >= 0:  # transformers counts the embeddings as 0
            layer -= theirs["num_hidden_layers"] + 1
        values["feature_layer"] = layer
    strategy = given.get("vision_feature_select_strategy")
    if strategy not in (None, family.feature_strategy):
        key = "vision_feature_select_strategy"
        raise _unknown(file, key, strategy, family.feature_strategy)
    return _section(VisionConfig, values, file)


def vision_to_hf(vision: VisionConfig) -> PreTrainedConfig:
    """The vision tower as a transformers configuration: the inverse of ``vision_from_hf``."""
    from transformers import CONFIG_MAPPING

    family = vision_family(vision.family)
    values = {key: getattr(vision, ours) for ours, key in family.config.items()}
    return CONFIG_MAPPING[family.model_type](**values, **family.fixed_config)


def _with_defaults(model_type: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """The section, with transformers' values for what it leaves out."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    # An object without arguments has these computed from its other defaults.
    computed = {key: getattr(kind, key) for key in _COMPUTED if hasattr(kind, key)}
    return kind().to_dict() | computed | dict(section)


def _read_head_dim(theirs: Mapping[str, Any]) -> Any:
    """None where heads divide the hidden size among them, which is the usual case."""
    given, hidden, heads = (
        theirs.get("head_dim"),
        theirs["hidden_size"],
        theirs["num_attention_heads"],
    )
    is_usual = isinstance(given, int) and isinstance(heads, int) and given * heads == hidden
    return None if is_usual else given


def _read_rope(
    family: LanguageFamily,
    theirs: Mapping[str, Any],
    section: Mapping[str, Any],
    rope: Mapping[str, Any],
    file: Path,
) -> dict[str, Any]:
    """Our keys about RoPE.

    Args:
        theirs: The section with defaults filled in.
        section: What the file says.
        rope: Its ``rope_scaling``, or ``rope_parameters``, where transformers 5 puts all of it.
    """
    default_theta = _with_defaults(family.name, {})["rope_parameters"]["rope_theta"]
    base = rope.get("rope_theta") or section.get("rope_theta") or default_theta
    partial = rope.get("partial_rotary_factor", section.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise UnsupportedError("partial_rotary_factor", partial, 1.0)
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
    elif kind in family.longrope_names:
        values["longrope"] = {
            "short_factor": rope.get("short_factor"),
            "long_factor": rope.get("long_factor"),
            "factor": rope.get("factor") or positions / original,
            "original_max_position_embeddings": original,
        }
    elif kind != "default":
        raise UnsupportedError("rope_type", kind, "default, llama3 or longrope")
    return values


def _section(kind: type[_SectionT], values: dict[str, Any], file: Path) -> _SectionT:
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(f"{file} does not describe a model: {first_problem(error, kind)}") from None


def _check_types(values: Mapping[str, Any], file: Path) -> None:
    """Refuse values that no computation here can use; null is none where it may be left out.

    Raises:
        UserError: The first one.
    """
    for key, wanted in _TYPES.items():
        value: Any = values.get(key)
        if key not in values or (value is None and key not in _COUNTS):
            continue
        lowest = 0 if key == "max_window_layers" else 1
        fits = {
            "a whole number": type(value) is int and lowest <= value <= MAX_INT,
            "a number": type(value) in (int, float) and abs(value) <= MAX_FLOAT,
            "an object": isinstance(value, Mapping),
            "a list": isinstance(value, list),
        }[wanted]
        if not fits:
            raise UserError(f"{key} is {show(value)} in {file}: copy it again, {wanted} is needed.")


def _unknown(file: Path, key: str, value: object, known: object) -> UserError:
    return UserError(
        f"{key} is {show(value)} in {file}, but the model here only knows {known}: use weights of "
        "a supported architecture."
    )
