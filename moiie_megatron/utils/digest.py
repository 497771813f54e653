"""Digests of files and tensors, and equality of their bytes."""

from __future__ import annotations

import hashlib
import mmap
import zlib
from pathlib import Path

import torch
from torch import Tensor

from moiie_megatron.utils.errors import UserError

_BLOCK = 64 << 20  # bytes of a file that are mapped at a time


def file_digest(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    Raises:
        UserError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            for start in range(0, size, _BLOCK):
                length = min(_BLOCK, size - start)
                access = mmap.ACCESS_READ
                with mmap.mmap(stream.fileno(), length, access=access, offset=start) as block:
                    digest.update(block)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again.") from error
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a CPU tensor in row-major order, without a copy where they lie so."""
    return _flat(tensor).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """CRC-32 of ``tensor_bytes``, as hexadecimal digits.

    It is three times as fast as SHA-256 and enough to find where two checkpoints differ.
    """
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits; unlike ``torch.equal`` also where both hold NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # The widest type that fits: the comparison goes value by value.
    kind = torch.int64 if a.nbytes % 8 == 0 else torch.uint8
    return torch.equal(_flat(a).view(kind), _flat(b).view(kind))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1)
