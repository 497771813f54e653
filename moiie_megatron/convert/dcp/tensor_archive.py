"""One stored tensor of a ``torch_dist`` checkpoint: how its bytes lie in a file.

torch's file writer appends one ``torch.save`` archive (a zip with the bytes stored as they are)
per tensor and notes offset and length.  Writing lets torch make the archive and puts the values
in, wherever they lie; reading says which bytes of the file are the values, or maps them into
memory, so that a tensor costs no memory of its own and is gone from the process when let go.
"""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.serialization import config as serialization

from moiie_megatron.convert.tensor_bytes import FileRange, TensorBytes
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.errors import UserError

# Archives start at multiples of this; inside them torch aligns the bytes to as much.
ALIGNMENT: Final = 64
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = 30  # bytes in front of a zip part's name; the last four: length of name, of extra


def write_piece(
    stream: IO[bytes], data: TensorBytes, shape: tuple[int, ...] | None = None
) -> tuple[int, int]:
    """Append one tensor.

    Args:
        shape: Stored in place of the tensor's own; of as many values.

    Returns:
        Offset and length of its archive.
    """
    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
    offset = stream.tell()
    # Address space alone: nothing is written to these pages or read from them.
    stand_in = torch.empty(data.info.shape if shape is None else shape, dtype=data.info.dtype)
    recorder = _Recorder(stand_in)
    # torch.load does not look at the zip format's checksum, which costs more than writing.
    with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
        torch.save(stand_in, cast(IO[bytes], recorder))
    for content in recorder.written:
        if content is None:
            data.write_to(stream, is_hashed=True)
        else:
            stream.write(content)
    return offset, stream.tell() - offset


class _Recorder:
    """A file for ``torch.save`` that keeps what is written, and None in place of the values."""

    def __init__(self, tensor: Tensor) -> None:
        self.written: list[bytes | None] = []
        self._values = (tensor.data_ptr(), tensor.nbytes)

    def write(self, content: memoryview) -> int:
        is_values = (_address(content), len(content)) == self._values
        self.written.append(None if is_values else bytes(content))
        return len(content)

    def flush(self) -> None:
        """Nothing waits."""


def _address(content: memoryview) -> int:
    address: int = np.frombuffer(content, np.uint8).ctypes.data
    return address


@dataclass(frozen=True)
class StoredPiece:
    """A tensor in a file.

    Args:
        info: Shape and dtype.
        values: The bytes of its storage.
        stride: Of the tensor in its storage, in values, as is ``first``.
        first: Where it begins there.
    """

    info: TensorInfo
    values: FileRange
    stride: tuple[int, ...]
    first: int

    def tensor_bytes(self) -> TensorBytes | None:
        """Its values in row-major order; None where they are stored in another one."""
        if not torch.empty_strided(self.info.shape, self.stride, device="meta").is_contiguous():
            return None
        start = self.first * self.info.dtype.itemsize
        parts = [self.values.part(start, self.info.num_bytes)] if self.info.num_bytes else []
        return TensorBytes(self.info, parts)


def find_piece(file: Path, offset: int, length: int) -> StoredPiece:
    """Look at the archive of one tensor, not at its values.

    Raises:
        UserError: The file is missing, cut off, or holds something else there.
    """
    return _find(file, offset, length)[0]


def read_piece(file: Path, offset: int, length: int) -> Tensor:
    """Map one tensor into memory; changes to it do not reach the file.

    Raises:
        UserError: As ``find_piece``.
    """
    piece, mapped, begin = _find(file, offset, length)
    if not piece.info.num_bytes:
        return torch.empty(piece.info.shape, dtype=piece.info.dtype)
    count = piece.values.length // piece.info.dtype.itemsize
    flat = torch.frombuffer(mapped, dtype=piece.info.dtype, count=count, offset=begin)
    return flat.as_strided(piece.info.shape, piece.stride, piece.first)


def _find(file: Path, offset: int, length: int) -> tuple[StoredPiece, mmap.mmap, int]:
    """The tensor, the mapped file, and where in it the values begin."""
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        with file.open("rb") as stream:
            mapped = mmap.mmap(
                stream.fileno(), offset + length - start, access=mmap.ACCESS_COPY, offset=start
            )
        dtype, first, shape, stride, begin, size = _parse(mapped)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy the checkpoint again.") from error
    values = FileRange(file, start + begin, size)
    return StoredPiece(TensorInfo(shape, dtype), values, stride, first), mapped, begin


def _parse(
    mapped: mmap.mmap,
) -> tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...], int, int]:
    """The tensor of the archive at the end of ``mapped``.

    Returns:
        dtype, first value, shape, stride; begin and size in bytes of the values in ``mapped``.
    """
    # zipfile allows for bytes in front of an archive; its parameter is typed too narrowly.
    with zipfile.ZipFile(mapped) as archive:  # type: ignore[call-overload]
        parts = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in parts or "data/0" not in parts:
        raise UserError("there is no tensor")
    layout = _begin(mapped, parts["data.pkl"])
    pickled = mapped[layout : layout + parts["data.pkl"].file_size]
    dtype, first, shape, stride = _Layout(pickled).load()
    data = parts["data/0"]
    begin, count = _begin(mapped, data), data.file_size // dtype.itemsize
    extent = first + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
    if 0 not in shape and (extent > count or begin + data.file_size > len(mapped)):
        raise UserError(f"it holds {count} values where {extent} are needed")
    return dtype, first, shape, stride, begin, data.file_size


def _begin(mapped: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a part lie; parts are stored as they are."""
    lengths = mapped[info.header_offset + 26 : info.header_offset + 30]
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return info.header_offset + _LOCAL_HEADER + name + extra


class _Layout(pickle.Unpickler):
    """What ``torch.save`` says of a tensor.

    Trust: the names of ``find_class`` alone are resolved, to functions of this file and dtypes,
    so that a file from anywhere can do no more than be refused.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def load(self) -> tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
        result = super().load()
        if not isinstance(result, tuple) or len(result) != 4:
            raise UserError("there is no tensor")
        return result

    def persistent_load(self, pid: Any) -> torch.dtype:
        """``("storage", type, key, location, count)``."""
        if pid[0] != "storage" or pid[2] != "0":
            raise UserError("there is more than one tensor")
        dtype: torch.dtype = pid[1]
        return dtype

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _rebuild_tensor(dtype: torch.dtype, first: int, shape: Any, stride: Any, *_: Any) -> Any:
    return dtype, first, tuple(shape), tuple(stride)
