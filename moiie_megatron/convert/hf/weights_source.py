"""The weights of a Hugging Face directory, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from moiie_megatron.convert.hf.weights_file import (
    DTYPES,
    SAFETENSORS,
    TORCH,
    Header,
    WeightsFile,
    open_file,
    unreadable,
)
from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.families.family import Part
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.errors import UserError

# In transformers' order (modeling_utils.py, _get_resolved_checkpoint_files): what an earlier save
# left behind is not read.
_INDEX: Final = ".index.json"
_ADAPTER: Final = "adapter_config.json"
_MODELS: Final = ("model.safetensors", "pytorch_model.bin")


class WeightsSource:
    """The tensors of a directory, or of a single file.

    A directory has ``model.safetensors``, the files that ``model.safetensors.index.json`` lists,
    ``pytorch_model.bin``, or the files that ``pytorch_model.bin.index.json`` lists; the first of
    them is read.

    Only the headers are read at first; ``get`` maps one tensor into memory.

    Raises:
        UserError: No such directory or file, no weights in it, or a file that is missing, cut off
            or not in the format.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, WeightsFile] = {}
        self._parts: dict[str, tuple[str, Part]] = {}
        self._headers: dict[str, Header] = {}
        for path in weights_files(self.directory):
            file = open_file(path)
            self._headers |= file.headers
            self._file_of |= dict.fromkeys(file.headers, file)

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
        file, header = self._find(name), self._headers[name]
        if header.dtype not in DTYPES:
            raise UserError(
                f"The tensor {name} in {file.path} has dtype {header.dtype}: use weights in "
                f"{', '.join(DTYPES)}, not quantised ones."
            )
        return TensorInfo(header.shape, DTYPES[header.dtype])

    def get(self, name: str) -> Tensor:
        """Read one tensor to the CPU.

        Raises:
            UserError: The tensor is missing or its file unreadable.
        """
        return self._find(name).get(*self._parts.get(name, (name, ())))

    def get_bytes(self, name: str) -> TensorBytes:
        """The bytes of a tensor in its file; in memory for a part whose bytes do not lie together.

        Raises:
            UserError: As ``info`` and ``get``.
        """
        self.info(name)
        return self._find(name).get_bytes(*self._parts.get(name, (name, ())))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is there, from its file's header."""
        return self._headers[name].shape

    def replace(self, name: str, parts: Mapping[str, Part]) -> None:
        """Let parts of a tensor (as it is in its file) stand in its place, under other names.

        Args:
            parts: Name -> index into the tensor; the empty index is all of it.
        """
        assert name not in self._parts, name  # no parts of parts
        file = self._file_of.pop(name)
        header = self._headers.pop(name)
        for part, index in parts.items():
            self._file_of[part] = file
            self._parts[part] = (name, index)
            shape = torch.empty(header.shape, device="meta")[index].shape
            self._headers[part] = Header(tuple(shape), header.dtype)

    def _find(self, name: str) -> WeightsFile:
        if name not in self._file_of:
            raise UserError(
                f"The tensor {name} is missing in {self.directory}: use weights of the "
                "configured architecture."
            )
        return self._file_of[name]

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({file.path for file in self._file_of.values()})


def weights_files(path: Path) -> list[Path]:
    """The files with weights at ``path``: itself, or those of a directory that are read.

    Raises:
        UserError: There are none, or an index that is damaged or lists a missing file.
    """
    if path.is_file():
        if path.suffix not in (SAFETENSORS, *TORCH):
            raise UserError(
                f"{path} is a file of another kind than {SAFETENSORS} or {', '.join(TORCH)}: give "
                "a directory in Hugging Face format, or such a file."
            )
        return [path]
    if not path.is_dir():
        raise UserError(f"There is no directory or file {path}: give one in Hugging Face format.")
    for name in _MODELS:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}{_INDEX}"
        if index.is_file():
            return _listed(index)
    if (path / _ADAPTER).is_file():
        raise UserError(
            f"{path} holds a LoRA adapter ({_ADAPTER}) and not the model: merge it with peft's "
            "merge_and_unload, and save the result."
        )
    raise UserError(
        f"{path} holds none of {', '.join(f'{name}, {name}{_INDEX}' for name in _MODELS)}: save "
        "the model there with save_pretrained."
    )


def _listed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:
        raise unreadable(index, error) from error
    for file in files:
        if not file.is_file():
            raise UserError(f"{index} lists {file.name}, which is missing: copy it again.")
    return files
