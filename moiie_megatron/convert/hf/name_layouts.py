"""Language models in Hugging Face directories, whoever wrote them, under the tables' names.

Sources: transformers' ``conversion_mapping.py``, entries ``llava`` and ``mixtral``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from moiie_megatron.convert.hf.safetensors_reader import Part, SafetensorsSource
from moiie_megatron.families.weight_map import EXPORTED, REFERENCE, NameLayout

# LLaVA's names on the hub, and those that transformers 5 has for them.
_LLAVA = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": EXPORTED.language,
    "multi_modal_projector.": EXPORTED.connector,
    "vision_tower.": EXPORTED.vision,
}
_FUSED_EXPERTS = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)")


def open_language(directory: str | Path) -> tuple[SafetensorsSource, NameLayout]:
    """A directory with a language model, alone or in a composed model, and how it is named.

    Raises:
        UserError: As ``SafetensorsSource``.
    """
    source = SafetensorsSource(directory)
    for name in source.names:
        for theirs, ours in _LLAVA.items():
            if name.startswith(theirs):
                source.replace(name, {ours + name.removeprefix(theirs): ()})
    _split_experts(source)
    names = source.names
    is_composed = any(name.startswith(EXPORTED.language) for name in names)
    is_split = any(name.endswith(".mlp.experts.0.gate_proj.weight") for name in names)
    return source, replace(EXPORTED if is_composed else REFERENCE, split_experts=is_split)


def _split_experts(source: SafetensorsSource) -> None:
    """Give Mixtral's experts, one tensor per layer in transformers 5, their names on the hub."""
    for name in source.names:
        match = _FUSED_EXPERTS.fullmatch(name)
        if match is None:
            continue
        layer, kind = match.groups()
        shape = source.shape(name)  # (experts, 2 f, h): rows [gate | up]; or (experts, h, f)
        ffn, parts = shape[1] // 2, dict[str, Part]()
        for expert in range(shape[0]):
            start = f"{layer}.block_sparse_moe.experts.{expert}."
            if kind == "down_proj":
                parts[start + "w2.weight"] = (expert, slice(None))
            else:
                parts[start + "w1.weight"] = (expert, slice(0, ffn))
                parts[start + "w3.weight"] = (expert, slice(ffn, shape[1]))
        source.replace(name, parts)
        router = f"{layer}.mlp.gate.weight"
        if router in source:
            source.replace(router, {f"{layer}.block_sparse_moe.gate.weight": ()})
