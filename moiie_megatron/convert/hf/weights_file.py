"""One file of weights, safetensors or ``torch.save``: what is in it, and one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moiie_megatron.convert.tensor_bytes import FileRange, TensorBytes
from moiie_megatron.families.family import Part
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.torch_files import TorchFileError, load_torch_file

SAFETENSORS: Final = ".safetensors"
TORCH: Final = (".bin", ".pt", ".pth")
# What safetensors calls the dtypes of weights; buffers may have others.
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAME_OF: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor; the dtype by the name that safetensors has for it."""

    shape: tuple[int, ...]
    dtype: str


class WeightsFile(Protocol):
    """A file whose values are read when they are asked for."""

    @property
    def path(self) -> Path: ...

    @property
    def headers(self) -> Mapping[str, Header]: ...

    def get(self, name: str, part: Part) -> Tensor:
        """A tensor, or a part of it (the empty index is all of it), on the CPU.

        Raises:
            UserError: The file is unreadable.
        """
        ...

    def get_bytes(self, name: str, part: Part) -> TensorBytes:
        """The bytes of what ``get`` gives, in the file where they lie there in order."""
        ...


def open_file(path: Path) -> WeightsFile:
    """A file by the ending of its name.

    Raises:
        UserError: It is missing, cut off or of another format.
    """
    return SafetensorsFile(path) if path.suffix == SAFETENSORS else TorchFile(path)


def unreadable(file: Path, error: Exception) -> UserError:
    """The error about a file that is damaged."""
    return UserError(f"{file} cannot be read ({error}): copy or save it again.")


class SafetensorsFile:
    """A safetensors file; only its header is in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The library checks the header but does not tell the places, so it is read once more.
        try:
            with safe_open(path, framework="pt") as tensors:
                parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                self.headers = {
                    name: Header(tuple(p.get_shape()), p.get_dtype()) for name, p in parts.items()
                }
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                content = json.loads(stream.read(length))
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error
        self._begins = {n: 8 + length + content[n]["data_offsets"][0] for n in self.headers}

    def get(self, name: str, part: Part) -> Tensor:
        """See ``WeightsFile``."""
        try:
            with safe_open(self.path, framework="pt") as tensors:
                found: Tensor
                found = tensors.get_slice(name)[part] if part else tensors.get_tensor(name)
                return found
        except (SafetensorError, OSError) as error:
            raise unreadable(self.path, error) from error

    def get_bytes(self, name: str, part: Part) -> TensorBytes:
        """See ``WeightsFile``."""
        header = self.headers[name]
        dtype = DTYPES[header.dtype]
        view = TensorInfo(header.shape, dtype).meta()[part]
        if not view.is_contiguous():
            return TensorBytes.of(self.get(name, part))
        info = TensorInfo.of(view)
        offset = self._begins[name] + int(view.storage_offset()) * dtype.itemsize
        return TensorBytes(info, [FileRange(self.path, offset, info.num_bytes)])


class TorchFile:
    """A file of ``torch.save`` with tensors by name (``pytorch_model.bin``, ``mm_projector.bin``).

    Nothing in it is run.  Values stay in the file until they are used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers = {
            name: Header(tuple(tensor.shape), _NAME_OF.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in self._tensors.items()
        }

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        try:
            content: Any = load_torch_file(self.path)
        except (TorchFileError, OSError) as error:
            raise unreadable(self.path, error) from error
        tensors = isinstance(content, dict) and {
            name: value for name, value in content.items() if isinstance(value, Tensor)
        }
        if not tensors or any(not isinstance(name, str) for name in tensors):
            raise UserError(
                f"{self.path} holds no tensors by name: give the file that save_pretrained or "
                "torch.save(model.state_dict()) wrote."
            )
        return tensors

    def get(self, name: str, part: Part) -> Tensor:
        """See ``WeightsFile``."""
        return self._tensors[name][part]

    def get_bytes(self, name: str, part: Part) -> TensorBytes:
        """See ``WeightsFile``."""
        return TensorBytes.of(self.get(name, part))
