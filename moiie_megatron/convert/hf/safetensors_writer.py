"""Writes safetensors shards tensor by tensor.

The format (github.com/huggingface/safetensors, README) is the length of a JSON header in 8 bytes,
the header with every tensor's dtype, shape and place, and the bytes.  The library's own writer
wants all tensors of a file at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final

import torch
from torch import Tensor

from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.digest import tensor_bytes

INDEX: Final = "model.safetensors.index.json"
_BYTES_PER_FILE = 5_000_000_000  # transformers' choice
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class SafetensorsWriter:
    """Writes tensors that are announced beforehand, in the order announced.

    One file is ``model.safetensors``; several get numbers and an index, which is written last.

    Args:
        folder: Exists.
        tensors: Name, shape and dtype of everything that will be written.
        bytes_per_file: A new file begins before one would exceed this.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, TensorInfo]],
        bytes_per_file: int = _BYTES_PER_FILE,
    ) -> None:
        self.folder = folder
        self.files = _divide(tensors, bytes_per_file)
        self._waiting = iter([(file, name) for file, part in self.files.items() for name in part])
        self._open: tuple[str, IO[bytes]] | None = None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open is not None:
            self._open[1].close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        file, expected = next(self._waiting)
        assert name == expected, (name, expected)
        assert TensorInfo.of(tensor) == self.files[file][name], name
        if self._open is None or self._open[0] != file:
            if self._open is not None:
                self._open[1].close()
            stream = (self.folder / file).open("wb")
            stream.write(_header(self.files[file]))
            self._open = (file, stream)
        self._open[1].write(tensor_bytes(tensor))

    def finish(self) -> None:
        """Write the index; all tensors have been written."""
        assert next(self._waiting, None) is None
        if len(self.files) == 1:
            return
        infos = [info for part in self.files.values() for info in part.values()]
        index = {
            "metadata": {"total_size": sum(info.num_bytes for info in infos)},
            "weight_map": {name: file for file, part in self.files.items() for name in part},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _divide(
    tensors: Sequence[tuple[str, TensorInfo]], bytes_per_file: int
) -> dict[str, dict[str, TensorInfo]]:
    parts: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors:
        if parts[-1] and size + info.num_bytes > bytes_per_file:
            parts.append({})
            size = 0
        parts[-1][name] = info
        size += info.num_bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    count = len(parts)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": part
        for number, part in enumerate(parts, start=1)
    }


def _header(tensors: dict[str, TensorInfo]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        end = offset + info.num_bytes
        content[name] = {
            "dtype": _DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes behind it are aligned
    return len(text).to_bytes(8, "little") + text
