"""The weights of a Hugging Face directory, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moiie_megatron.convert.tensor_bytes import FileRange, TensorBytes
from moiie_megatron.families.family import Part
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.errors import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What the format calls the dtypes of weights; buffers may have others.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class SafetensorsSource:
    """The tensors of a directory, or of a single safetensors file.

    A directory has ``model.safetensors``, or the files that ``model.safetensors.index.json`` lists.

    Only the headers are read at first; ``get`` maps one tensor into memory.

    Raises:
        UserError: No such directory, no safetensors in it, or a file that is missing, cut off
            or not in the format.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir() and self.directory.suffix != ".safetensors":
            raise UserError(
                f"There is no directory {self.directory}: give a folder in Hugging Face format."
            )
        self._file_of: dict[str, Path] = {}
        self._parts: dict[str, tuple[str, Part]] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        self._stored: dict[str, tuple[tuple[int, ...], int]] = {}  # shape, where it begins
        for file in self._files():
            header, begins = _header(file)
            self._headers |= header
            self._file_of |= dict.fromkeys(header, file)
            self._stored |= {name: (header[name][0], begin) for name, begin in begins.items()}

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, from the header alone.

        Raises:
            UserError: The tensor is missing or no weight.
        """
        file = self._find(name)
        shape, dtype = self._headers[name]
        if dtype not in _DTYPES:
            raise UserError(
                f"The tensor {name} in {file} has dtype {dtype}: use weights in "
                f"{', '.join(_DTYPES)}, not quantised ones."
            )
        return TensorInfo(shape, _DTYPES[dtype])

    def get(self, name: str) -> Tensor:
        """Read one tensor to the CPU.

        Raises:
            UserError: The tensor is missing or its file unreadable.
        """
        file = self._find(name)
        stored, part = self._parts.get(name, (name, ()))
        try:
            with safe_open(file, framework="pt") as tensors:
                if part:
                    return tensors.get_slice(stored)[part]
                tensor: Tensor = tensors.get_tensor(stored)
                return tensor
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error

    def get_bytes(self, name: str) -> TensorBytes:
        """The bytes of a tensor in its file; in memory for a part whose bytes do not lie together.

        Raises:
            UserError: As ``info`` and ``get``.
        """
        info, file = self.info(name), self._find(name)
        stored, index = self._parts.get(name, (name, ()))
        shape, begin = self._stored[stored]
        part = TensorInfo(shape, info.dtype).meta()[index]
        if not part.is_contiguous():
            return TensorBytes.of(self.get(name))
        offset = begin + int(part.storage_offset()) * info.dtype.itemsize
        return TensorBytes(info, [FileRange(file, offset, info.num_bytes)])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is there, from its file's header."""
        return self._headers[name][0]

    def replace(self, name: str, parts: Mapping[str, Part]) -> None:
        """Let parts of a tensor (as it is in its file) stand in its place, under other names.

        Args:
            parts: Name -> index into the tensor; the empty index is all of it.
        """
        assert name not in self._parts, name  # no parts of parts
        file = self._file_of.pop(name)
        shape, dtype = self._headers.pop(name)
        for part, index in parts.items():
            self._file_of[part] = file
            self._parts[part] = (name, index)
            self._headers[part] = (tuple(torch.empty(shape, device="meta")[index].shape), dtype)

    def _find(self, name: str) -> Path:
        if name not in self._file_of:
            raise UserError(
                f"The tensor {name} is missing in {self.directory}: use weights of the "
                "configured architecture."
            )
        return self._file_of[name]

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(set(self._file_of.values()))

    def _files(self) -> list[Path]:
        if self.directory.suffix == ".safetensors" and not self.directory.is_dir():
            return [self.directory]
        index = self.directory / _INDEX
        if not index.is_file():
            if not (self.directory / _SINGLE).is_file():
                raise UserError(
                    f"{self.directory} holds neither {_SINGLE} nor {_INDEX}: save the model in "
                    "safetensors format."
                )
            return [self.directory / _SINGLE]
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (
            OSError,
            ValueError,
            LookupError,
            AttributeError,
            TypeError,
            RecursionError,
        ) as error:
            raise _unreadable(index, error) from error
        files = [self.directory / name for name in names]
        for file in files:
            if not file.is_file():
                raise UserError(f"{index} lists {file.name}, which is missing: copy it again.")
        return files


def _header(file: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, int]]:
    """Shape and dtype of every tensor in a file, and where its bytes begin.

    The library checks the header but does not tell the places, so it is read once more.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            header = {name: (tuple(p.get_shape()), p.get_dtype()) for name, p in parts.items()}
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            content = json.loads(stream.read(length))
        begins = {name: 8 + length + content[name]["data_offsets"][0] for name in header}
        return header, begins
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read ({error}): copy or save it again.")
