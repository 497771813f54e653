"""Writes a Megatron ``torch_dist`` checkpoint tensor by tensor: no process group, no model.

The format is that of ``torch.distributed.checkpoint`` (``.metadata`` with a pickled
``Metadata``, ``*.distcp`` with the tensors; torch/distributed/checkpoint/filesystem.py) inside
Megatron's (``common.pt``, ``metadata.json``; megatron/core/dist_checkpointing/core.py).  torch's
own ``FileSystemWriter`` holds on to every tensor of a file until the file is done, so it cannot
write a model that is larger than the memory.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from moiie_megatron.checkpoint.stored_state import BACKEND_FILE, BACKENDS, COMMON_FILE
from moiie_megatron.convert.dcp.tensor_archive import StoredPiece, find_piece, write_piece
from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.utils.dcp_metadata import METADATA_FILE

_BYTES_PER_FILE = 4 << 30


@dataclass(frozen=True)
class Place:
    """Where a tensor, or one expert's part of it, was written."""

    file: Path
    offset: int
    length: int

    def find(self) -> StoredPiece:
        """Look it up in the file, as a reader of the checkpoint does; experts have their axis.

        Raises:
            UserError: There is no tensor.
        """
        return find_piece(self.file, self.offset, self.length)


class CheckpointWriter:
    """Appends tensors to files in ``folder``; ``finish`` makes them a checkpoint.

    Args:
        folder: Exists and is empty.
        bytes_per_file: A new file begins when one has reached this size.
    """

    def __init__(self, folder: Path, bytes_per_file: int = _BYTES_PER_FILE) -> None:
        self.folder = folder
        self._bytes_per_file = bytes_per_file
        self._stream: IO[bytes] | None = None
        self._num_files = 0
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def write(self, name: str, data: Tensor | TensorBytes) -> Place:
        """Write a whole tensor."""
        data = TensorBytes.of(data)
        return self._write(name, data, data.info.shape, [0] * len(data.info.shape))

    def write_expert(
        self, name: str, data: Tensor | TensorBytes, expert: int, num_experts: int
    ) -> Place:
        """Write one expert's part of a tensor whose leading axis are the experts.

        Args:
            data: Without that axis.
            expert: Logical id.
        """
        data = TensorBytes.of(data)
        shape, offset = [num_experts, *data.info.shape], [expert] + [0] * len(data.info.shape)
        return self._write(name, data, shape, offset)

    def write_part(
        self,
        name: str,
        data: Tensor | TensorBytes,
        shape: Sequence[int],
        offsets: Sequence[int],
    ) -> Place:
        """Write one part of a tensor.

        Args:
            shape: Of the whole tensor.
            offsets: Where the part begins in it.
        """
        return self._write(name, TensorBytes.of(data), shape, offsets)

    def write_object(self, name: str, data: bytes) -> None:
        """Write what is no tensor, as it was stored (``CheckpointReader.get_object``)."""
        stream = self._file()
        self._places[MetadataIndex(name)] = _StorageInfo(
            Path(stream.name).name, stream.tell(), len(data)
        )
        stream.write(data)
        self._objects[name] = BytesStorageMetadata()

    def new_file(self) -> None:
        """What follows goes into another file."""
        self._close()

    def finish(self, common: dict[str, Any]) -> None:
        """Write what makes the files a checkpoint, ``metadata.json`` last.

        Args:
            common: State that is not cut into shards (``load_common`` reads it).
        """
        self._close()
        torch.save(common, self.folder / COMMON_FILE)
        metadata = Metadata(
            state_dict_metadata={**self._tensors, **self._objects},
            storage_data=self._places,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        with (self.folder / METADATA_FILE).open("wb") as stream:
            pickle.dump(metadata, stream)
        (self.folder / BACKEND_FILE).write_text(json.dumps(BACKENDS))

    def _write(
        self, name: str, data: TensorBytes, shape: Sequence[int], offsets: Sequence[int]
    ) -> Place:
        index = MetadataIndex(name, offsets)
        assert index not in self._places, f"{name} at {offsets} is written twice"
        sizes = torch.Size([1] * (len(shape) - len(data.info.shape)) + list(data.info.shape))
        stream = self._file()
        offset, length = write_piece(stream, data, tuple(sizes))
        stream.flush()
        place = Place(Path(stream.name), offset, length)
        self._places[index] = _StorageInfo(place.file.name, offset, length)
        if name not in self._tensors:
            self._tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=data.info.dtype), torch.Size(shape), []
            )
        self._tensors[name].chunks.append(ChunkStorageMetadata(torch.Size(offsets), sizes))
        return place

    def _file(self) -> IO[bytes]:
        """The file to append to."""
        if self._stream is None or self._stream.tell() >= self._bytes_per_file:
            self._close()
            self._stream = (self.folder / f"__0_{self._num_files}.distcp").open("wb")
            self._num_files += 1
        return self._stream

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
