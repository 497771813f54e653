"""The weights of a Hugging Face directory, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """``model.safetensors``, or the files that ``model.safetensors.index.json`` lists.

    Only the headers are read at first; ``get`` reads one tensor.

    Raises:
        ValueError: No such directory, no safetensors in it, or a file that is missing, cut off
            or not in the format.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(
                f"There is no directory {self.directory}: give a folder in Hugging Face format."
            )
        self._file_of: dict[str, Path] = {}
        for file in self._files():
            for name in _names(file):
                self._file_of[name] = file

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """Read one tensor to the CPU.

        Raises:
            ValueError: The tensor is missing or its file unreadable.
        """
        if name not in self._file_of:
            raise ValueError(
                f"The tensor {name} is missing in {self.directory}: use weights of the "
                "configured architecture."
            )
        file = self._file_of[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                tensor: Tensor = tensors.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error

    def _files(self) -> list[Path]:
        index = self.directory / _INDEX
        if not index.is_file():
            if not (self.directory / _SINGLE).is_file():
                raise ValueError(
                    f"{self.directory} holds neither {_SINGLE} nor {_INDEX}: save the model in "
                    "safetensors format."
                )
            return [self.directory / _SINGLE]
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise _unreadable(index, error) from error
        files = [self.directory / name for name in names]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{index} lists {file.name}, which is missing: copy it again.")
        return files


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} cannot be read ({error}): copy or save it again.")
