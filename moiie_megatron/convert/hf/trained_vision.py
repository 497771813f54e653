"""The vision tower of a trained model: where its configuration and its weights are.

Exports and LLaVA describe it in ``config.json``.  The reference's checkpoints hold the weights
but only name the encoder that they came from (``mm_vision_tower``), and their tower ends where
its features are taken: the layers behind that are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moiie_megatron.config.schema import VisionConfig
from moiie_megatron.convert.hf.config import read_config, read_vision_config
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.utils.errors import UserError

_PATCHES = "embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        config: As it is in the weights.
        directory: Where the weights are.
        is_inside: They are in the trained model's own files.
    """

    config: VisionConfig
    directory: Path
    is_inside: bool


def find_vision(directory: Path, vision: Path | None) -> Tower:
    """The tower of a trained model.

    Args:
        directory: The trained model.
        vision: Hugging Face directory of the encoder, where the model does not describe it.

    Raises:
        UserError: Nobody describes the tower, or its weights lack layers that features need.
    """
    _, given = read_config(directory)
    described = vision
    if isinstance(given.get("vision_config"), dict):
        if vision is not None:
            raise UserError(f"{directory} describes its vision tower itself: leave {vision} out.")
        described = directory
    named = str(given.get("mm_vision_tower", ""))
    if described is None and named and Path(named).is_dir():
        described = Path(named)
    if described is None:
        hint = f" ({named})" if named else ""
        raise UserError(
            f"{directory} does not describe its vision tower: name the Hugging Face directory of "
            f"the encoder that it was trained with{hint} as --vision."
        )
    config = read_vision_config(described)
    source = WeightsSource(directory)
    prefixes = [name.removesuffix(_PATCHES) for name in source.names if name.endswith(_PATCHES)]
    if not prefixes:
        return Tower(config, described, is_inside=False)
    return Tower(_with_layers(config, source, prefixes[0]), directory, is_inside=True)


def _with_layers(config: VisionConfig, source: WeightsSource, prefix: str) -> VisionConfig:
    """The configuration of a tower whose last layers may be missing; the features stay."""
    pattern = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    found = {int(match[1]) for name in source.names if (match := pattern.match(name))}
    missing = config.num_layers - len(found)
    if not 0 <= missing < -config.feature_layer:
        raise UserError(
            f"The vision tower in {source.directory} has {len(found)} layers where its encoder has "
            f"{config.num_layers}, of which the features are hidden state {config.feature_layer}: "
            "name the encoder that it was trained with."
        )
    layers = {"num_layers": len(found), "feature_layer": config.feature_layer + missing}
    return config.model_copy(update=layers)
