"""Export: a Megatron checkpoint of any parallel layout -> a Hugging Face directory.

Needs only the checkpoint: no process group, no Megatron, one tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moiie_megatron.checkpoint.directory import CONFIG_FILE
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.hf import image_row
from moiie_megatron.convert.hf.export_files import write_files
from moiie_megatron.convert.hf.safetensors_writer import SafetensorsWriter
from moiie_megatron.convert.tensor_bytes import TensorBytes, transformed
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.families import weight_map
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.families.weight_map import WeightMapping
from moiie_megatron.utils.directories import check_output, new_directory
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import NoteFn, ProgressCounter, ProgressFn

MARKER = "config.json"  # by which an export is recognised before it is replaced


class Readable(Protocol):
    """What an export needs of a checkpoint; see ``CheckpointReader``."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> RunConfig: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def info(self, name: str, expert: int | None = None) -> TensorInfo: ...

    def get_bytes(self, name: str, expert: int | None = None) -> TensorBytes: ...


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    bytes_per_file: int = 5_000_000_000,
    progress: ProgressFn | None = None,
    note: NoteFn | None = None,
) -> Path:
    """Write a directory that transformers loads with ``trust_remote_code=True``.

    Weights keep the checkpoint's dtype.

    Args:
        checkpoint: A checkpoint folder, or a run's output folder (its newest checkpoint).
        force: Replace an earlier export at ``out``.
        bytes_per_file: Largest size of a file, unless a single tensor is larger.
        progress: Told about every tensor written.
        note: Told what the export cannot promise, or leaves out.

    Returns:
        ``out``.

    Raises:
        UserError: A checkpoint that is incomplete, of a newer version or of another model than
            its configuration says, or an output that may not be replaced or does not fit.
    """
    out = Path(out)
    check_output(out, force=force, marker=MARKER)
    export_from(CheckpointReader(checkpoint), out, force, bytes_per_file, progress, note)
    return out


def export_from(
    reader: Readable,
    out: Path,
    force: bool = False,
    bytes_per_file: int = 5_000_000_000,
    progress: ProgressFn | None = None,
    note: NoteFn | None = None,
) -> None:
    """``export_checkpoint`` for what reads like a checkpoint."""
    rows = exported_rows(reader.config)
    tokenizer = load_tokenizer(reader.folder, reader.config.data.image_token)
    added = image_row.missing_rows(reader.config.language, tokenizer.image_id)
    plan = [(row, _infos(reader, row, added)) for row in rows]
    names = [(name, info) for row, infos in plan for name, info in zip(row.hf, infos, strict=True)]
    total = sum(info.num_bytes for _, info in names)
    dtype = reader.info(rows[-1].megatron, rows[-1].expert).dtype
    with (
        new_directory(out, num_bytes=total, force=force, marker=MARKER) as folder,
        SafetensorsWriter(folder, names, bytes_per_file) as writer,
    ):
        # First, because what they need may be missing.
        for sentence in write_files(reader.folder, reader.config, tokenizer, folder, dtype):
            if note:
                note(sentence)
        counter = ProgressCounter(total, progress)
        for row, _ in plan:
            whole = image_row.add_rows(row, reader.get_bytes(row.megatron, row.expert), added)
            parts = transformed(partial(_to_hf, row), [whole])
            for name, part in zip(row.hf, parts, strict=True):
                writer.write(name, part)
            counter.add(whole.info.num_bytes)
        writer.finish()


def _to_hf(row: WeightMapping, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    (tensor,) = tensors
    return row.transform.to_hf(tensor)


def exported_rows(config: RunConfig) -> list[WeightMapping]:
    """Every tensor of an export and what it is made from, in the order of the files."""
    return weight_map.model_rows(config)


def _infos(reader: Readable, row: WeightMapping, added: int) -> list[TensorInfo]:
    """Shape and dtype of the tensors that a row becomes.

    Args:
        added: Rows that the vocabulary gets for the image token.
    """
    whole = reader.info(row.megatron, row.expert)
    have, want = reader.tensors[row.megatron].shape, row.full_shape
    if row.expert is not None:
        want = (reader.config.moe.layout.num_experts, *want)
    if have != want:
        raise UserError(
            f"{row.megatron} has shape {have} in {reader.folder} but its {CONFIG_FILE} means "
            f"{want}: restore the file that belongs to the checkpoint."
        )
    whole = image_row.with_rows(row, whole, added)
    return [TensorInfo.of(part) for part in row.transform.to_hf(whole.meta())]
