"""Import: a trained MoIIE model in Hugging Face files -> a Megatron checkpoint.

Reads what ``to_hf.py`` exports, and checkpoints trained with the reference's code
(github.com/AlenjandroWang/MoIIE): language model and experts under the reference's names, vision
tower anywhere below ``vision_tower.``, connector as ``mm_projector``.  Tensor by tensor; no GPU,
no process group, no Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moiie_megatron.checkpoint.directory import copy_tokenizer
from moiie_megatron.config.schema import LanguageConfig, RunConfig
from moiie_megatron.convert.checkpoint_output import MARKER, checkpoint_output, initial_state
from moiie_megatron.convert.conversion_report import ConversionReport
from moiie_megatron.convert.default_run_config import run_from_checkpoint, template_of
from moiie_megatron.convert.fresh_weights import fresh_connector
from moiie_megatron.convert.hf.config import (
    is_untied_by_weights,
    read_config,
    read_language_config,
    read_moe_config,
    untied_note,
)
from moiie_megatron.convert.hf.reader import HfReader, language_reader, vision_reader
from moiie_megatron.convert.hf.trained_experts import Groups, TrainedExperts, read_trained_experts
from moiie_megatron.convert.hf.trained_vision import Tower, find_vision
from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.families import weight_map
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.families.weight_map import WeightMapping
from moiie_megatron.layout.experts import moe_layers
from moiie_megatron.utils.directories import check_output
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.json_file import read_json_object
from moiie_megatron.utils.progress import ProgressFn

_FIRST = f"{weight_map.CONNECTOR}linear_1.weight"
_SEED = 1234  # of a fresh connector, and of the run in the checkpoint
_PROCESSOR = "processor_config.json"


@dataclass(frozen=True)
class Imported:
    """A new checkpoint, and sentences that its maker should read."""

    folder: Path
    notes: tuple[str, ...]


def import_checkpoint(
    directory: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    groups: Groups | None = None,
    last_image_token_as_text: bool = False,
    force: bool = False,
    progress: ProgressFn | None = None,
) -> Imported:
    """Write a checkpoint that training can go on from and that can be exported.

    Weights keep their dtype.

    Args:
        directory: An export, or a checkpoint of the reference with its tokenizer.
        vision: Hugging Face directory of the vision encoder, where ``directory`` does not
            describe it (the reference's checkpoints do not).
        groups: Numbers of vision, shared and text experts, where the reference's checkpoint does
            not tell.
        last_image_token_as_text: Keep the reference's rule that the last image token of every run
            counts as text; an export says so itself.
        force: Replace an earlier checkpoint at ``out``.
        progress: Told about every tensor written.

    Raises:
        UserError: Sources or output that cannot be used, said before anything is written; or a
            source that turns out to be unreadable.
    """
    directory, out = Path(directory), Path(out)
    check_output(out, force=force, marker=MARKER)
    source = _Source.open(directory, None if vision is None else Path(vision), groups)
    template, reason = template_of(directory, source.language)
    config = _config(directory, out, source, template, last_image_token_as_text)
    weights = _Weights(source, config)
    plan = [(row, weights.info(row)) for row in weights.rows]
    operation = {
        "operation": "import",
        "hf": str(directory),
        "vision": str(source.tower.directory),
        "last_image_token_as_text": config.moe.last_image_token_as_text,
    }
    with checkpoint_output(
        out,
        num_bytes=sum(info.num_bytes for _, info in plan),
        force=force,
        progress=progress,
        report=ConversionReport(operation, source.files),
    ) as output:
        for row, _ in plan:
            output.write(row, weights.get_bytes(row), config.moe.layout)
        copy_tokenizer(directory, output.directory)
        output.finish(config, initial_state(_SEED))
    notes = [*([reason] if reason else []), *_notes(source, config)]
    return Imported(out, tuple(notes))


@dataclass(frozen=True)
class _Source:
    """What a directory is found to hold."""

    language: LanguageConfig
    experts: TrainedExperts
    tower: Tower
    decoder: HfReader  # and the connector
    vision: HfReader

    @classmethod
    def open(cls, directory: Path, vision: Path | None, groups: Groups | None) -> _Source:
        if read_moe_config(directory) is not None:
            raise UserError(f"{directory} is a language model alone: upcycle it instead.")
        language = read_language_config(directory)
        experts = read_trained_experts(directory, language.num_layers, groups)
        tower = find_vision(directory, vision)
        layout, layers = experts.moe.layout, []
        if not layout.is_dense:
            layers = moe_layers(experts.moe.layers, language.num_layers)
        decoder = language_reader(language, layout, layers, directory, experts.ignored)
        if tower.is_inside and decoder.row(_FIRST, None) is None:
            raise UserError(
                f"{directory} holds a vision tower but no connector (mm_projector or "
                "multi_modal_projector): copy the checkpoint again."
            )
        return cls(language, experts, tower, decoder, vision_reader(tower.config, tower.directory))

    @property
    def has_connector(self) -> bool:
        return self.decoder.row(_FIRST, None) is not None

    @property
    def files(self) -> list[Path]:
        return sorted({*self.decoder.source.files, *self.vision.source.files})


def _config(
    directory: Path, out: Path, source: _Source, template: str, last_image_token_as_text: bool
) -> RunConfig:
    first, embedding = (
        source.decoder.info(_FIRST, None),
        source.decoder.info(weight_map.EMBEDDING, None),
    )
    assert embedding is not None
    moe = source.experts.moe
    if last_image_token_as_text and moe.layout.is_dense:
        raise UserError(f"{directory} has no experts: leave the reference mask out.")
    config = run_from_checkpoint(
        out,
        language=source.language,
        vision=source.tower.config,
        connector_size=None if first is None else first.shape[0],
        moe=moe.model_copy(
            update={
                "last_image_token_as_text": last_image_token_as_text or moe.last_image_token_as_text
            }
        ),
        template=template,
        dtype=embedding.dtype,
        seed=_SEED,
    )
    processor = _processor(directory)
    stage = config.stage.model_copy(update={"image_mode": processor["image_mode"]})
    data = config.data.model_copy(update={"image_token": processor["image_token"]})
    return config.model_copy(update={"stage": stage, "data": data})


def _processor(directory: Path) -> dict[str, Any]:
    """How images are prepared and what stands for them: as exported, or in LLaVA's terms."""
    file = directory / _PROCESSOR
    if not file.is_file():
        _, given = read_config(directory)
        is_padded = given.get("image_aspect_ratio") == "pad"
        return {"image_mode": "pad" if is_padded else "square", "image_token": "<image>"}
    content = read_json_object(file, "copy it again")
    mode, token = content.get("image_mode", "square"), content.get("image_token", "<image>")
    if mode not in ("square", "pad"):
        raise UserError(f"image_mode is {mode} in {file}: use square or pad.")
    return {"image_mode": mode, "image_token": token}


class _Weights:
    """Every tensor of the new checkpoint, by its row in the name tables."""

    def __init__(self, source: _Source, config: RunConfig) -> None:
        self._source, self._config = source, config
        self._connector: Mapping[str, Tensor] = {}
        self.rows = weight_map.model_rows(config)
        if not source.has_connector:
            dtype = self._info(
                next(row for row in self.rows if row.megatron == weight_map.EMBEDDING)
            ).dtype
            self._connector = {
                weight_map.CONNECTOR + name: tensor.to(dtype)
                for name, tensor in fresh_connector(config).items()
            }

    def info(self, row: WeightMapping) -> TensorInfo:
        """Shape and dtype.

        Raises:
            UserError: Another shape than the configuration means.
        """
        info, shape = self._info(row), row.full_shape
        if info.shape != shape:
            raise UserError(
                f"{row.megatron} has shape {info.shape} in the source but its config.json means "
                f"{shape}: use the weights that belong to it."
            )
        return info

    def get_bytes(self, row: WeightMapping) -> TensorBytes:
        if row.megatron in self._connector:
            return TensorBytes.of(self._connector[row.megatron])
        data = self._reader(row).get_bytes(row.megatron, row.expert)
        assert data is not None, row
        return data

    def _info(self, row: WeightMapping) -> TensorInfo:
        if row.megatron in self._connector:
            return TensorInfo.of(self._connector[row.megatron])
        info = self._reader(row).info(row.megatron, row.expert)
        assert info is not None, row  # the readers refuse a source that lacks a tensor
        return info

    def _reader(self, row: WeightMapping) -> HfReader:
        is_vision = row.megatron.startswith(weight_map.VISION)
        return self._source.vision if is_vision else self._source.decoder


def _notes(source: _Source, config: RunConfig) -> list[str]:
    notes = []
    directory = source.decoder.source.directory
    if is_untied_by_weights(source.language, directory):
        notes.append(f"{untied_note(directory)}.")
    if source.experts.is_reference and not config.moe.last_image_token_as_text:
        notes.append(
            "The names are the reference's: if its published code trained the model, import it "
            "with --last-image-token-as-text, which keeps its rule that the last image token of "
            "every run counts as text."
        )
    if not source.has_connector:
        notes.append("There is no connector in the files: it starts fresh.")
    return notes
