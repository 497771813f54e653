"""The weights of a model in any of our formats, under one naming: Megatron name and expert id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moiie_megatron.checkpoint.directory import CONFIG_FILE, find_checkpoint, latest_checkpoint
from moiie_megatron.config.schema import LanguageConfig, VisionConfig
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.export import exported_rows
from moiie_megatron.convert.hf.config import read_config, read_language_config, read_moe_config
from moiie_megatron.convert.hf.reader import (
    HfReader,
    language_reader,
    refuse_unused,
    vision_reader,
)
from moiie_megatron.convert.hf.trained_experts import EXPORT, read_trained_experts
from moiie_megatron.convert.hf.trained_vision import find_vision
from moiie_megatron.families import weight_map
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.layout.experts import ExpertLayout, moe_layers
from moiie_megatron.utils.errors import UserError

Key = tuple[str, int | None]  # Megatron name, logical expert id

_CONNECTOR = f"{weight_map.CONNECTOR}linear_1.weight"


@dataclass(frozen=True)
class Weights:
    """A model on disk; ``get`` reads one tensor at a time.

    Args:
        folder: Where it is.
        is_megatron: A Megatron checkpoint, otherwise a Hugging Face directory.
        is_moiie: Of the kind that this project exports (config.json with model_type moiie).
        language: The decoder.
        vision: The vision tower; None for a language model alone.
        experts: Names of the experts in logical order; empty for a dense model.
        image_token_id: What a Hugging Face model takes for an image position; None elsewhere.
        keys: Every tensor, experts that share a name one after the other.
        info: Shape and dtype of a key.
        get: Its full tensor.
    """

    folder: Path
    is_megatron: bool
    is_moiie: bool
    language: LanguageConfig
    vision: VisionConfig | None
    experts: tuple[str, ...]
    image_token_id: int | None
    keys: tuple[Key, ...]
    info: Callable[[str, int | None], TensorInfo]
    get: Callable[[str, int | None], Tensor]

    def describe(self) -> str:
        """One line for people."""
        kind = "Megatron checkpoint" if self.is_megatron else "Hugging Face directory"
        parts = [self.language.family]
        if self.vision is not None:
            parts.append(f"with {self.vision.family}")
        parts.append(f"experts {' '.join(self.experts)}" if self.experts else "dense")
        return f"{self.folder}: {kind}, {', '.join(parts)}, {len(self.keys)} tensors"


def open_weights(path: str | Path) -> Weights:
    """Open a Megatron checkpoint or a Hugging Face directory.

    A checkpoint is named by its directory or by the output directory of its run.  A Hugging Face
    directory holds a language model, alone or composed with a vision tower, an exported MoIIE
    model, or one trained with the reference's code.

    Only headers are read.

    Raises:
        UserError: There is no such model, or tensors are missing, superfluous or unreadable.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = f"{path} is a file" if folder.exists() else f"There is no folder {path}"
        raise UserError(
            f"{what}: name a Hugging Face directory, a checkpoint or the output folder of a run."
        )
    if (folder / CONFIG_FILE).is_file() or latest_checkpoint(folder) is not None:
        return _megatron(find_checkpoint(folder))
    if (folder / "config.json").is_file():
        return _hugging_face(folder)
    raise UserError(
        f"{path} holds neither config.json (a Hugging Face directory) nor {CONFIG_FILE} (a "
        "Megatron checkpoint): name a folder with a model."
    )


def _megatron(folder: Path) -> Weights:
    reader = CheckpointReader(folder)
    config = reader.config
    keys = _keys(exported_rows(config))
    for name, expert in keys:
        reader.info(name, expert)  # says what is missing
    prefixes = (weight_map.LANGUAGE, weight_map.VISION, weight_map.CONNECTOR)
    present = [name for name in reader.tensors if name.startswith(prefixes)]
    refuse_unused(present, {name for name, _ in keys}, [], str(folder))
    return Weights(
        folder,
        is_megatron=True,
        is_moiie=False,
        language=config.language,
        vision=config.vision,
        experts=_names(config.moe.layout, config.moe_layers),
        image_token_id=None,
        keys=keys,
        info=reader.info,
        get=reader.get,
    )


def _hugging_face(folder: Path) -> Weights:
    _, content = read_config(folder)
    language = read_language_config(folder)
    moe, ignored = read_moe_config(folder), tuple[str, ...]()
    if moe is None:
        trained = read_trained_experts(folder, language.num_layers)
        moe, ignored = trained.moe, trained.ignored
    layout = moe.layout
    layers = [] if layout.is_dense else moe_layers(moe.layers, language.num_layers)
    reader = language_reader(language, layout, layers, folder, ignored)
    # The reference's checkpoints name the encoder's directory at most.
    named = content.get("mm_vision_tower")
    is_described = "vision_config" in content or (bool(named) and Path(str(named)).is_dir())
    tower = find_vision(folder, None) if is_described else None
    rows, readers = (
        weight_map.language_rows(language, layout, layers),
        {weight_map.LANGUAGE: reader},
    )
    if tower is not None:
        readers[weight_map.VISION] = vision_reader(tower.config, tower.directory)
        rows += weight_map.vision_rows(tower.config)
    if tower is not None or reader.row(_CONNECTOR, None) is not None:
        readers[weight_map.CONNECTOR] = reader
        rows += weight_map.connector_rows()
    keys, files = _keys(rows), _HfFiles(readers)
    for name, expert in keys:
        files.info(name, expert)  # says what is missing
    return Weights(
        folder,
        is_megatron=False,
        is_moiie=content.get("model_type") == EXPORT,
        language=language,
        vision=None if tower is None else tower.config,
        experts=_names(layout, layers),
        image_token_id=content.get("image_token_id", content.get("image_token_index")),
        keys=keys,
        info=files.info,
        get=files.get,
    )


class _HfFiles:
    """Readers by the first part of a Megatron name."""

    def __init__(self, readers: dict[str, HfReader]) -> None:
        self._readers = readers

    def info(self, name: str, expert: int | None) -> TensorInfo:
        reader = self._of(name)
        info = reader.info(name, expert)
        if info is None:
            raise UserError(
                f"{reader.source.directory} holds nothing for {name}: use weights that belong to "
                "its config.json."
            )
        return info

    def get(self, name: str, expert: int | None) -> Tensor:
        tensor = self._of(name).get(name, expert)
        assert tensor is not None, name  # `info` was asked first
        return tensor

    def _of(self, name: str) -> HfReader:
        return next(r for prefix, r in self._readers.items() if name.startswith(prefix))


def _keys(rows: Sequence[weight_map.WeightMapping]) -> tuple[Key, ...]:
    by_name: dict[str, list[Key]] = {}
    for row in rows:
        by_name.setdefault(row.megatron, []).append((row.megatron, row.expert))
    return tuple(key for keys in by_name.values() for key in keys)


def _names(layout: ExpertLayout, layers: Sequence[int]) -> tuple[str, ...]:
    return tuple(layout.name(i) for i in range(layout.num_experts)) if layers else ()
