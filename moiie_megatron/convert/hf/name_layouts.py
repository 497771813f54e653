"""Language models in Hugging Face directories, whoever wrote them, under the tables' names.

Source: transformers' ``conversion_mapping.py``, entry ``llava``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.families.family import LanguageFamily
from moiie_megatron.families.weight_map import EXPORTED, REFERENCE, NameLayout

# LLaVA's names on the hub, and those that transformers 5 has for them.
_LLAVA = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": EXPORTED.language,
    "multi_modal_projector.": EXPORTED.connector,
    "vision_tower.": EXPORTED.vision,
}


def open_language(
    directory: str | Path, family: LanguageFamily | None = None
) -> tuple[WeightsSource, NameLayout]:
    """A directory with a language model, alone or in a composed model, and how it is named.

    Args:
        family: Where it is given, tensors that transformers stores together are split as the
            family's table names them.

    Raises:
        UserError: As ``WeightsSource``.
    """
    source = WeightsSource(directory)
    for name in source.names:
        for theirs, ours in _LLAVA.items():
            if name.startswith(theirs):
                source.replace(name, {ours + name.removeprefix(theirs): ()})
    if family is not None and family.split_stored is not None:
        for name in source.names:
            parts = family.split_stored(name, source.shape(name))
            if parts is not None:
                source.replace(name, parts)
    names = source.names
    is_composed = any(name.startswith(EXPORTED.language) for name in names)
    is_split = any(name.endswith(".mlp.experts.0.gate_proj.weight") for name in names)
    return source, replace(EXPORTED if is_composed else REFERENCE, split_experts=is_split)
