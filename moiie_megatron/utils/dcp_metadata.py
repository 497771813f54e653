"""Reads ``.metadata`` of a torch distributed checkpoint without running anything in it.

The file is a pickle, whose opcodes may import and call any function.  Here they can only fill
objects that do nothing: each name of a short list gets a class of its own, made for this one call,
and any other name is refused.  What torch and Megatron-Core need is then built from their values.
Format: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA_FILE: Final = ".metadata"

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_PLANNER: Final = "torch.distributed.checkpoint.planner"
_SHARDED: Final = "torch.distributed._shard.sharded_tensor.metadata"  # of older torch versions
# All that torch and Megatron-Core write, plans of the ranks that saved included.
_NAMES: Final = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *((_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
        *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
        *((_SHARDED, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")),
        *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
        *((_PLANNER, name) for name in ("TensorWriteData", "BytesIOWriteData")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch.serialization", "_get_layout"),
        *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    }
)


class MetadataError(ValueError):
    """The file is damaged, or refers to what a checkpoint has no use for."""


def load_metadata(stream: IO[bytes], directory: Path) -> Metadata:
    """The content of ``.metadata``.

    Args:
        stream: The file.
        directory: The checkpoint's, in which all its files lie.

    Raises:
        MetadataError: See there; a few words.
        OSError: The file cannot be read.
    """
    try:
        found = _Unpickler(stream).load()
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise whatever the opcodes run into
        raise MetadataError(str(error).splitlines()[0] if str(error) else "is damaged") from error
    try:
        return _metadata(found, directory)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MetadataError(f"does not describe a checkpoint ({error})") from error


def read_metadata(directory: Path) -> Metadata:
    """``load_metadata`` of a checkpoint's directory."""
    with (directory / METADATA_FILE).open("rb") as stream:
        return load_metadata(stream, directory)


class _Object:
    """Whatever the pickle makes of a name: keeps arguments and state, and does nothing."""

    def __init__(self, *_: Any) -> None:
        """Arguments (of enumerations, paths, layouts) are not needed."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        # Opcodes can also set attributes of a class: never of one that anybody else uses.
        return self._classes.setdefault((module, name), type(name, (_Object,), {}))


def _metadata(found: Any, directory: Path) -> Metadata:
    _require(found, "Metadata")
    entries = {_text(name): _entry(entry) for name, entry in found.state_dict_metadata.items()}
    places = {_index(key): _place(place, directory) for key, place in found.storage_data.items()}
    for name, entry in entries.items():
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else None
        for offset in [None] if chunks is None else [chunk.offsets for chunk in chunks]:
            if MetadataIndex(name, offset) not in places:
                raise ValueError(f"it does not say where {name} is")
    values = vars(found)
    paths, shapes = values.get("planner_data"), values.get("mcore_data") or {}
    metadata = Metadata(
        entries,
        planner_data=paths and {_text(name): _path(path) for name, path in paths.items()},
        storage_data=places,
        storage_meta=StorageMeta(),
    )
    # Megatron-Core's own addition: shapes of tensors that are stored in other ones.
    metadata.mcore_data = {  # type: ignore[attr-defined]
        _text(name): {_text(kind): tuple(_sizes(shape)) for kind, shape in of_name.items()}
        for name, of_name in shapes.items()
    }
    return metadata


def _entry(found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(found).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    _require(found, "TensorStorageMetadata")
    _require(found.properties, "TensorProperties")
    dtype, size = found.properties.values[0], _sizes(found.size)
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no dtype")
    chunks = []
    for chunk in found.chunks:
        _require(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
        ends = (offset + length for offset, length in zip(offsets, sizes, strict=True))
        if any(end > whole for end, whole in zip(ends, size, strict=True)):
            raise ValueError("a part of a tensor lies outside of it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _index(found: Any) -> MetadataIndex:
    _require(found, "MetadataIndex")
    offset, index = (vars(found).get(name) for name in ("offset", "index"))
    if not isinstance(index, int | None):
        raise ValueError("the number of a part is no number")
    return MetadataIndex(_text(found.fqn), None if offset is None else _sizes(offset), index)


def _place(found: Any, directory: Path) -> _StorageInfo:
    _require(found, "_StorageInfo")
    name = _text(found.relative_path)
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"it names the file {name}, which is not in {directory}")
    offset, length = _sizes((found.offset, found.length))
    # Extensions that transform the bytes have code of their own: none is used.
    if vars(found).get("transform_descriptors"):
        raise ValueError("its tensors are compressed or encrypted")
    return _StorageInfo(name, offset, length)


def _require(found: Any, name: str) -> None:
    if type(found).__name__ != name:
        raise ValueError(f"it holds {type(found).__name__} in place of {name}")


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise ValueError("a name is no text")
    return found


def _path(found: Any) -> tuple[str | int, ...]:
    """Keys into nested dictionaries and lists."""
    if not isinstance(found, tuple) or not all(isinstance(key, str | int) for key in found):
        raise ValueError("a path is no path")
    return found


def _sizes(found: Any) -> torch.Size:
    if not isinstance(found, Sequence) or any(
        type(size) is not int or not 0 <= size < 1 << 62 for size in found
    ):
        raise ValueError("a size is no number")
    if math.prod(found) >= 1 << 62:
        raise ValueError("a size is too large")
    return torch.Size(found)
