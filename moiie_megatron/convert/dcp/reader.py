"""Reads any Megatron ``torch_dist`` checkpoint tensor by tensor, of whatever parallel layout.

No process group and no model: ``.metadata`` says where every part of every tensor lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from moiie_megatron.checkpoint.directory import CONFIG_FILE, find_checkpoint
from moiie_megatron.checkpoint.manifest import Manifest
from moiie_megatron.checkpoint.stored_state import (
    BACKEND_FILE,
    COMMON_FILE,
    read_common,
    read_stored_tensors,
)
from moiie_megatron.checkpoint.verify_files import damaged
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.dcp.tensor_archive import StoredPiece, find_piece, read_piece
from moiie_megatron.convert.tensor_bytes import Part, TensorBytes
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.families.weight_map import VOCABULARY
from moiie_megatron.layout.vocabulary import is_padded_vocab
from moiie_megatron.utils.dcp_metadata import METADATA_FILE
from moiie_megatron.utils.errors import UserError


class CheckpointReader:
    """A checkpoint folder; only its metadata is held in memory.

    Args:
        path: The folder itself, or a run's output folder (its newest checkpoint).

    Raises:
        UserError: The folder is no complete checkpoint, or one of a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = find_checkpoint(path)
        self._manifest, self._checked = _manifest(self.folder), set[str]()
        self.common = read_common(self.folder)
        metadata = read_stored_tensors(self.folder)
        for name in (METADATA_FILE, BACKEND_FILE, COMMON_FILE):
            self._check(name)
        self._places = metadata.storage_data
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        # Megatron-Core 0.19 writes the common state as one of them too.
        self.objects = [
            name
            for name in metadata.state_dict_metadata
            if name not in self._tensors and not name.startswith("common_state/")
        ]
        # Experts are the leading axis of a tensor.
        self.tensors = {
            name: TensorInfo(self._shape(name, entry), entry.properties.dtype)
            for name, entry in self._tensors.items()
        }

    @cached_property
    def config(self) -> RunConfig:
        """The configuration in the folder, without any parallelism.

        Raises:
            UserError: It is missing or broken.
        """
        return load_saved_config(self.folder / CONFIG_FILE, ["parallel={}"])

    def _shape(self, name: str, entry: TensorStorageMetadata) -> tuple[int, ...]:
        """A table of the vocabulary (or its optimizer state) is read without rows that pad it."""
        shape = tuple(entry.size)
        if name.endswith(VOCABULARY):
            tokens = self.config.language.vocab_size
            if is_padded_vocab(shape[0], tokens):
                return (tokens, *shape[1:])
        return shape

    def info(self, name: str, expert: int | None = None) -> TensorInfo:
        """Shape and dtype of a tensor, or of one expert's part.

        Raises:
            UserError: The checkpoint does not have it.
        """
        self._require(name, expert)
        info = self.tensors[name]
        return info if expert is None else TensorInfo(info.shape[1:], info.dtype)

    def get(self, name: str, expert: int | None = None) -> Tensor:
        """A whole tensor or one expert's part, put together from the parts that ranks wrote.

        Where it was written in one part it is mapped, not copied.

        Raises:
            UserError: The checkpoint does not have it, or a file is unreadable.
        """
        self._require(name, expert)
        entry = self._tensors[name]
        shape = self.info(name, expert).shape
        chunks = self._chunks(name, expert)
        if len(chunks) == 1:
            piece = self._piece(name, chunks[0], expert)
            if piece.shape == shape:
                return piece
        full = torch.empty(shape, dtype=entry.properties.dtype)
        filled = 0
        for chunk in chunks:
            piece = self._piece(name, chunk, expert)
            offsets = chunk.offsets if expert is None else chunk.offsets[1:]
            box = tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))
            full[box].copy_(piece)
            filled += piece.numel()
        self._check_filled(name, filled, full)
        return full

    def get_bytes(self, name: str, expert: int | None = None) -> TensorBytes:
        """The bytes of what ``get`` gives: in the checkpoint's files where they lie there in order.

        They do where the tensor was written in one part, or in parts by rows.

        Raises:
            UserError: As ``get``.
        """
        info = self.info(name, expert)
        if self.tensors[name].shape != tuple(self._tensors[name].size):
            return TensorBytes.of(self.get(name, expert))
        chunks = self._chunks(name, expert)
        skipped = 0 if expert is None else 1  # the experts' axis
        parts: list[Part] = []
        row = 0
        for chunk in sorted(chunks, key=lambda chunk: tuple(chunk.offsets)):
            offsets, sizes = chunk.offsets[skipped:], tuple(chunk.sizes[skipped:])
            found = None
            if sizes[1:] == info.shape[1:] and tuple(offsets[:1]) in ((row,), ()):
                found = self._find_piece(name, chunk).tensor_bytes()
            if found is None:
                return TensorBytes.of(self.get(name, expert))
            if expert is not None:
                each = [TensorInfo(sizes, info.dtype)] * chunk.sizes[0]
                found = found.split(each)[expert - chunk.offsets[0]]
            parts += found.parts
            row += sizes[0] if sizes else 1
        if row != (info.shape[0] if info.shape else 1):
            return TensorBytes.of(self.get(name, expert))  # says what is missing
        return TensorBytes(info, parts)

    def get_part(self, name: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box of a tensor; only the parts that it touches are read.

        Raises:
            UserError: As ``get``.
        """
        self._require(name, None)
        entry, filled = self._tensors[name], 0
        part = torch.empty(tuple(shape), dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            begin = [max(o, c) for o, c in zip(offsets, chunk.offsets, strict=True)]
            sizes = zip(offsets, shape, chunk.offsets, chunk.sizes, strict=True)
            end = [min(o + n, c + m) for o, n, c, m in sizes]
            if any(a >= b for a, b in zip(begin, end, strict=True)):
                continue
            box = list(zip(begin, end, strict=True))
            theirs = tuple(
                slice(a - c, b - c) for (a, b), c in zip(box, chunk.offsets, strict=True)
            )
            piece = self._piece(name, chunk, None)[theirs]
            if piece.shape == part.shape:
                return piece
            part[tuple(slice(a - o, b - o) for (a, b), o in zip(box, offsets, strict=True))] = piece
            filled += piece.numel()
        self._check_filled(name, filled, part)
        return part

    def get_object(self, name: str) -> bytes:
        """What is no tensor (``objects``), as it is stored.

        Raises:
            UserError: A file is unreadable.
        """
        place = self._places[MetadataIndex(name)]
        self._check(place.relative_path)
        file = self.folder / place.relative_path
        try:
            with file.open("rb") as stream:
                stream.seek(place.offset)
                data: bytes = stream.read(place.length)
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error}): copy the checkpoint again."
            ) from error
        if len(data) < place.length:
            raise UserError(f"{file} is cut off: copy the checkpoint again.")
        return data

    def _piece(self, name: str, chunk: ChunkStorageMetadata, expert: int | None) -> Tensor:
        place = self._places[MetadataIndex(name, chunk.offsets)]
        self._check(place.relative_path)
        piece = read_piece(self.folder / place.relative_path, place.offset, place.length)
        self._check_shape(name, chunk, piece.shape)
        if expert is not None:
            return piece[expert - chunk.offsets[0]]
        return piece[: self.tensors[name].shape[0] - chunk.offsets[0]] if piece.dim() else piece

    def _chunks(self, name: str, expert: int | None) -> list[ChunkStorageMetadata]:
        """The parts of a tensor, or those that hold an expert."""
        chunks = self._tensors[name].chunks
        if expert is not None:
            return [chunk for chunk in chunks if _holds(chunk, expert)]
        shape = self.tensors[name].shape
        return [chunk for chunk in chunks if not shape or chunk.offsets[0] < shape[0]]

    def _find_piece(self, name: str, chunk: ChunkStorageMetadata) -> StoredPiece:
        place = self._places[MetadataIndex(name, chunk.offsets)]
        self._check(place.relative_path)
        piece = find_piece(self.folder / place.relative_path, place.offset, place.length)
        self._check_shape(name, chunk, piece.info.shape)
        return piece

    def _check(self, file: str) -> None:
        """Compare a file with its digest in the manifest before anything in it is used; once."""
        if file not in self._checked:
            fault = None if self._manifest is None else self._manifest.fault(file)
            if fault is not None:
                raise damaged(self.folder, fault)
            self._checked.add(file)

    def _check_shape(self, name: str, chunk: ChunkStorageMetadata, shape: Sequence[int]) -> None:
        if tuple(shape) != tuple(chunk.sizes):
            place = self._places[MetadataIndex(name, chunk.offsets)]
            raise UserError(
                f"{self.folder / place.relative_path} holds {tuple(shape)} values for "
                f"{name} where {tuple(chunk.sizes)} are expected: copy the checkpoint again."
            )

    def _check_filled(self, name: str, filled: int, full: Tensor) -> None:
        if filled < full.numel():
            raise UserError(
                f"The parts of {name} in {self.folder} hold {filled} of its {full.numel()} values: "
                "copy the checkpoint again."
            )

    def _require(self, name: str, expert: int | None) -> None:
        if name not in self._tensors:
            raise UserError(
                f"The checkpoint {self.folder} has no tensor {name}: it belongs to another model "
                f"than its {CONFIG_FILE} describes."
            )
        if expert is not None and expert >= self._tensors[name].size[0]:
            raise UserError(
                f"{name} holds {self._tensors[name].size[0]} experts in the checkpoint "
                f"{self.folder}, expert {expert} is none of them: its {CONFIG_FILE} describes "
                "another model."
            )


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except ValueError as error:
        raise damaged(folder, str(error)) from error


def _holds(chunk: ChunkStorageMetadata, expert: int) -> bool:
    return chunk.offsets[0] <= expert < chunk.offsets[0] + chunk.sizes[0]
