"""One stored tensor of a ``torch_dist`` checkpoint: how its bytes lie in a file.

torch's file writer appends one ``torch.save`` archive (a zip with the bytes stored as they are)
per tensor and notes offset and length.  Reading maps those bytes into memory instead of copying
them, so that a tensor costs no memory of its own and is gone from the process when let go.
"""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor
from torch.utils.serialization import config as serialization

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


def write_piece(stream: IO[bytes], tensor: Tensor) -> tuple[int, int]:
    """Append one tensor.

    Returns:
        Offset and length of its archive.
    """
    # torch.save writes the whole storage: a part of a larger one needs a copy.
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.contiguous().clone()
    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
    offset = stream.tell()
    # torch.load does not look at the zip format's checksum, which costs more than writing.
    with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
        torch.save(tensor, stream)
    return offset, stream.tell() - offset


def read_piece(file: Path, offset: int, length: int) -> Tensor:
    """Map one tensor into memory; changes to it do not reach the file.

    Raises:
        UserError: The file is missing, cut off, or holds something else there.
    """
    try:
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        with file.open("rb") as stream:
            mapped = mmap.mmap(
                stream.fileno(), offset + length - start, access=mmap.ACCESS_COPY, offset=start
            )
        return _mapped_tensor(mapped)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy the checkpoint again.") from error


def _mapped_tensor(mapped: mmap.mmap) -> Tensor:
    """The tensor of the archive at the end of ``mapped``."""
    # zipfile allows for bytes in front of an archive; its parameter is typed too narrowly.
    with zipfile.ZipFile(mapped) as archive:  # type: ignore[call-overload]
        parts = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in parts or "data/0" not in parts:
        raise UserError("there is no tensor")
    layout = _begin(mapped, parts["data.pkl"])
    pickled = mapped[layout : layout + parts["data.pkl"].file_size]
    dtype, first, shape, stride = _Layout(pickled).load()
    data = parts["data/0"]
    begin = _begin(mapped, data)
    count = data.file_size // dtype.itemsize
    extent = first + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    if extent > count or begin + data.file_size > len(mapped):
        raise UserError(f"it holds {count} values where {extent} are needed")
    flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin)
    return flat.as_strided(shape, stride, first)


def _begin(mapped: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a part lie; parts are stored as they are."""
    lengths = mapped[info.header_offset + 26 : info.header_offset + 30]
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return info.header_offset + _LOCAL_HEADER + name + extra


class _Layout(pickle.Unpickler):
    """What ``torch.save`` says of a tensor; nothing else can be made with it."""

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
