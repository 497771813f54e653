"""Reads files of ``torch.save`` without running anything in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

_FOREIGN = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")


class TorchFileError(ValueError):
    """Why a file cannot be read, in a few words."""


def load_torch_file(file: Path, *, is_mapped: bool = False) -> Any:
    """The tensors, numbers, texts and containers in a file, on the CPU.

    Args:
        is_mapped: Leave the values of tensors in the file until they are used; the file has to
            be in the format of torch 1.6 or newer.

    Raises:
        TorchFileError: The file is damaged, or refers to anything else (``weights_only``).
        OSError: It cannot be opened.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except OSError:
        raise
    except Exception as error:  # damaged archives and pickles raise many types
        foreign = _FOREIGN.search(str(error)) if "eights" in str(error) else None
        raise TorchFileError(
            f"it refers to {foreign[1]}, which is no weight" if foreign else "it is damaged"
        ) from error
