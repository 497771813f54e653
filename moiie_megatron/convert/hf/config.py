"""Which model the ``config.json`` of a Hugging Face directory describes.

The file may be that of a language model or a vision model alone, or of a composed model
(``text_config``, ``vision_config``).  A run that configures another model than the file describes
is refused: weights of the right shapes would load in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moiie_megatron.config.schema import LanguageConfig, MoEConfig, Section, VisionConfig
from moiie_megatron.convert.hf.image_row import added_rows
from moiie_megatron.convert.hf.tied_embeddings import OUTPUT_LAYER, has_own_output_layer
from moiie_megatron.families import hf_config
from moiie_megatron.families.registry import language_family, vision_family
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.json_file import read_json_object

# A run may use fewer positions than the model has.
_FREE = ("max_position_embeddings",)
# Our keys that have a default behind None, and where the number is.
_EFFECTIVE = {"head_dim": "head_size"}


def read_language_config(directory: str | Path) -> LanguageConfig:
    """The language model of a directory's ``config.json``.

    Experts are no part of this section (``read_moe_config``).  Embeddings that the file calls tied
    are not where the weights hold another output layer (``tied_embeddings.py``).

    Raises:
        UserError: No readable ``config.json``, or a model that ours cannot be.
    """
    file, given = read_config(directory)
    language = _described_language(file, given)
    if language.tied_embeddings and has_own_output_layer(directory):
        return language.model_copy(update={"tied_embeddings": False})
    return language


def is_untied_by_weights(language: LanguageConfig, directory: str | Path) -> bool:
    """Whether ``language`` has an output layer of its own where ``config.json`` ties it."""
    file, given = read_config(directory)
    return not language.tied_embeddings and _described_language(file, given).tied_embeddings


def untied_note(directory: str | Path) -> str:
    """What to say then."""
    return (
        f"{Path(directory) / 'config.json'} says tie_word_embeddings, but {OUTPUT_LAYER} differs "
        "from the embeddings: the embeddings are not tied"
    )


def _described_language(file: Path, given: dict[str, Any]) -> LanguageConfig:
    # transformers takes either place in composed models (LlavaConfig).
    is_tied = bool(given.get("tie_word_embeddings"))
    section = _subsection(given, "text_config")
    if added := added_rows(given):
        section = section | {"vocab_size": section["vocab_size"] - added}
    return hf_config.language_from_hf(section, file, is_tied=is_tied)


def read_moe_config(directory: str | Path) -> MoEConfig | None:
    """The experts that come with a pretrained language model.

    Returns:
        None for a dense family.

    Raises:
        UserError: As ``read_language_config``, or numbers of experts that cannot be.
    """
    file, given = read_config(directory)
    return hf_config.experts_from_hf(_subsection(given, "text_config"), file)


def read_vision_config(directory: str | Path) -> VisionConfig:
    """The vision tower of a directory's ``config.json``.

    Raises:
        UserError: No readable ``config.json``, or a model that ours cannot be.
    """
    file, given = read_config(directory)
    return hf_config.vision_from_hf(_subsection(given, "vision_config"), file, given)


def check_language_config(language: LanguageConfig, directory: str | Path) -> None:
    """Compare the run's ``language`` section with a directory's ``config.json``.

    Raises:
        UserError: As ``read_language_config``, or every difference in one sentence.
    """
    theirs = read_language_config(directory)
    if language.tied_embeddings and is_untied_by_weights(theirs, directory):
        raise UserError(f"{untied_note(directory)}, set language.tied_embeddings=false.")
    keys = {"family": "model_type", **language_family(theirs.family).config}
    _refuse_differences("language", language, theirs, keys, directory)


def check_moe_config(moe: MoEConfig, directory: str | Path) -> None:
    """Compare the run's ``moe`` section with the experts of a directory's ``config.json``.

    Raises:
        UserError: As ``read_moe_config``, or every difference in one sentence.
    """
    theirs = read_moe_config(directory)
    if theirs is not None:
        given = moe.model_copy(update={"num_shared_experts": moe.layout.num_shared})
        family = language_family(read_language_config(directory).family)
        _refuse_differences("moe", given, theirs, family.expert_config, directory)


def check_vision_config(vision: VisionConfig, directory: str | Path) -> None:
    """Compare the run's ``vision`` section with a ``config.json``, or its ``vision_config``.

    The feature layer is the run's own choice.

    Raises:
        UserError: As ``read_vision_config``, or every difference in one sentence.
    """
    theirs = read_vision_config(directory)
    keys = {"family": "model_type", **vision_family(theirs.family).config}
    _refuse_differences("vision", vision, theirs, keys, directory)


def read_config(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file ``config.json`` of a directory and what it holds.

    Raises:
        UserError: It is missing or no JSON object.
    """
    file = Path(directory) / "config.json"
    return file, read_json_object(file, "a pretrained model needs its config.json, copy it again")


def _subsection(given: dict[str, Any], name: str) -> dict[str, Any]:
    section = given.get(name) or given
    return section if isinstance(section, dict) else given


def _refuse_differences(
    name: str, ours: Section, theirs: Section, keys: Mapping[str, str], directory: str | Path
) -> None:
    """Compare two sections at the given keys (ours -> what ``config.json`` calls it)."""
    different = [
        f"{name}.{our_key} is {_shown(ours, our_key)} where {their_key} is "
        f"{_shown(theirs, our_key)}"
        for our_key, their_key in keys.items()
        if our_key not in _FREE and _value(ours, our_key) != _value(theirs, our_key)
    ]
    if different:
        raise UserError(
            f"The configuration does not describe the weights of {Path(directory) / 'config.json'}"
            f": {', '.join(different)}; use the same values or another pretrained directory."
        )


def _shown(section: Section, key: str) -> Any:
    value = _value(section, key)
    return value.model_dump() if isinstance(value, Section) else value


def _value(section: Section, key: str) -> Any:
    return getattr(section, _EFFECTIVE.get(key, key))
