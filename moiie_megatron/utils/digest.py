"""Digests of files and bytes, and equality of tensors.

Two algorithms: SHA-256 for small files that anybody may want to check (``sha256sum``), and
XXH3-128 for weights, which conversions hash as fast as they read them; it tells different bytes
apart, it does not protect against somebody who makes two files alike on purpose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from torch import Tensor

from moiie_megatron.utils.errors import UserError

SHA256: Final = "sha256"
XXH3_128: Final = "xxh3_128"


ALGORITHMS: Final[dict[str, Callable[[], Any]]] = {
    SHA256: hashlib.sha256,
    XXH3_128: xxhash.xxh3_128,
}


def file_digest(file: Path, algorithm: str = SHA256) -> str:
    """The digest of a file, as hexadecimal digits.

    Args:
        algorithm: ``SHA256`` or ``XXH3_128``.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, ALGORITHMS[algorithm]).hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again.") from error


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a CPU tensor in row-major order, without a copy where they lie so."""
    return _flat(tensor).view(torch.uint8).numpy().data


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits; unlike ``torch.equal`` also where both hold NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # The widest type that fits: the comparison goes value by value.
    kind = torch.int64 if a.nbytes % 8 == 0 else torch.uint8
    return torch.equal(_flat(a).view(kind), _flat(b).view(kind))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1)
