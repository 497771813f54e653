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
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.families.transforms import TensorInfo

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
        infos = dict(tensors)
        split = split_state_dict_into_shards_factory(
            infos,
            get_storage_size=lambda info: info.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=bytes_per_file,
        )
        self.files = {
            file: {name: infos[name] for name in names}
            for file, names in split.filename_to_tensors.items()
        }
        # A tensor larger than a file does not end the file before it.
        self._waiting = iter([(split.tensor_to_filename[name], name) for name in infos])
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

    def write(self, name: str, data: Tensor | TensorBytes) -> None:
        """Append the next tensor."""
        data = TensorBytes.of(data)
        file, expected = next(self._waiting)
        assert name == expected, (name, expected)
        assert data.info == self.files[file][name], name
        data.write_to(self._stream(file), is_hashed=False)

    def _stream(self, file: str) -> IO[bytes]:
        """The file to append to, with its header."""
        if self._open is None or self._open[0] != file:
            if self._open is not None:
                self._open[1].close()
            self._open = (file, (self.folder / file).open("ab"))
            if not self._open[1].tell():
                self._open[1].write(_header(self.files[file]))
        return self._open[1]

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
