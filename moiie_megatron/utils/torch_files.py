"""Reads files of ``torch.save`` without running anything in them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

_FOREIGN = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")


class TorchFileError(ValueError):
    """Why a file cannot be read, in a few words."""


def load_torch_file(file: Path | IO[bytes]) -> Any:
    """The tensors, numbers, texts and containers in a file, on the CPU.

    Args:
        file: Of a path, values of tensors stay in the file until they are used; not so in files
            of torch before 1.6.

    Raises:
        TorchFileError: The file is damaged, or refers to anything else (``weights_only``).
        OSError: It cannot be opened.
    """
    try:
        is_mapped = isinstance(file, Path) and zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except OSError:
        raise
    except Exception as error:  # damaged archives and pickles raise many types
        foreign = _FOREIGN.search(str(error)) if "eights" in str(error) else None
        raise TorchFileError(
            f"it refers to {foreign[1]}, which is no weight" if foreign else "it is damaged"
        ) from error
