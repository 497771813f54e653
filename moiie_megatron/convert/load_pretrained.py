"""Start from Hugging Face weights of a language model, a vision encoder, or both.

Each may be a model of its own or a part of a composed model.

A MoE model starts from a dense language model by upcycling while it loads: every rank takes its
own experts from the dense FFN (paper, section 3).
"""

from __future__ import annotations

from torch import Tensor

from moiie_megatron.config.schema import RunConfig, VisionConfig
from moiie_megatron.convert.fill_model import fill_model
from moiie_megatron.convert.hf.config import (
    check_language_config,
    check_moe_config,
    check_vision_config,
)
from moiie_megatron.convert.hf.reader import HfReader, language_reader, vision_reader
from moiie_megatron.families import weight_map
from moiie_megatron.vlm.chunks import ModelPart


def load_pretrained(model: ModelPart, config: RunConfig) -> list[str]:
    """Fill the model from ``language.pretrained`` and ``vision.pretrained``, where set.

    Without counterpart in the sources, routers and connector keep their fresh weights.  Every
    rank reads what it needs; there is no communication.

    Returns:
        The names on this rank that kept their fresh weights, sorted.

    Raises:
        UserError: A directory, file or tensor that is missing, unreadable, superfluous or of
            another architecture than the run's.
    """
    readers: dict[str, HfReader] = {}
    if config.language.pretrained is not None:
        reader = _language_reader(config, config.language.pretrained)
        readers[weight_map.LANGUAGE] = readers[weight_map.CONNECTOR] = reader
    if config.vision.pretrained is not None:
        readers[weight_map.VISION] = _vision_reader(config.vision, config.vision.pretrained)

    def get(name: str, expert: int | None) -> Tensor | None:
        for prefix, reader in readers.items():
            if name.startswith(prefix):
                return reader.get(name, expert)
        return None

    return fill_model(model, get)


def _language_reader(config: RunConfig, directory: str) -> HfReader:
    check_language_config(config.language, directory)
    check_moe_config(config.moe, directory)
    return language_reader(config.language, config.moe.layout, config.moe_layers, directory)


def _vision_reader(vision: VisionConfig, directory: str) -> HfReader:
    check_vision_config(vision, directory)
    return vision_reader(vision, directory)
