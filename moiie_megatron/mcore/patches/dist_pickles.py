"""torch's reader of distributed checkpoints, without the pickles that may run code.

Megatron-Core reads through it: ``.metadata`` with ``pickle.load``, objects that are no tensors
(random states, the state of a data stream) with ``torch.load(weights_only=False)``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any, Final, cast

from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from moiie_megatron.mcore.patches.patch import Patch
from moiie_megatron.utils.dcp_metadata import load_metadata
from moiie_megatron.utils.torch_files import load_torch_file


def refuse_code_in_checkpoints() -> None:
    """Let torch's reader take values from checkpoints and nothing else, in this process.

    Repeated calls change nothing.
    """
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]


def _read_metadata(self: FileSystemReader, *_: Any, **options: Any) -> Metadata:
    path = self._get_metadata_path(options.get("rank"))
    with self.fs.create_stream(path, "rb") as stream:
        metadata = load_metadata(cast(IO[bytes], stream), Path(self.path))
    assert metadata.storage_meta is not None
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    name, loaded = read_item.dest_index.fqn, load_torch_file(value)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


_CHECKPOINT: Final = "torch.distributed.checkpoint"
PATCHES: Final = (
    Patch(
        name="pickles in checkpoints",
        targets=(
            f"{_CHECKPOINT}.filesystem.FileSystemReader.read_metadata",
            f"{_CHECKPOINT}.filesystem.FileSystemReader._get_metadata_path",
            f"{_CHECKPOINT}.default_planner.DefaultLoadPlanner.load_bytes",
        ),
        reason="They unpickle without restrictions: a checkpoint from anywhere runs the code of "
        "whoever made it.",
    ),
)
