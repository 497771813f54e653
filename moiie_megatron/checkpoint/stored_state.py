"""The small files of a checkpoint: what it is, what is in it, and where that lies.

Every program reads them here, before Megatron-Core opens the directory.  Nothing in them is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from torch.distributed.checkpoint.metadata import Metadata

from moiie_megatron.checkpoint.directory import FORMAT_VERSION
from moiie_megatron.utils.dcp_metadata import METADATA_FILE, MetadataError, read_metadata
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.torch_files import TorchFileError, load_torch_file

COMMON_FILE: Final = "common.pt"
BACKEND_FILE: Final = "metadata.json"
# Megatron-Core's CheckpointingConfig.
BACKENDS: Final = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def read_common(checkpoint: Path) -> dict[str, Any]:
    """The part of a checkpoint that is equal on all ranks: progress, versions, schedule.

    Raises:
        UserError: There is no checkpoint, a file of it is missing or damaged, it is not of this
            project, or of a newer version.
    """
    if not checkpoint.is_dir():
        raise UserError(f"There is no checkpoint {checkpoint}: name a step_... directory.")
    _check_backend(checkpoint)
    try:
        common = load_torch_file(checkpoint / COMMON_FILE)
    except (OSError, TorchFileError) as error:
        raise _incomplete(checkpoint, COMMON_FILE, error) from error
    version = common.get("format_version") if isinstance(common, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{checkpoint} has format version {version}, this program reads up to "
            f"{FORMAT_VERSION}: update moiie-megatron."
        )
    if not isinstance(common.get("progress"), dict):
        raise _incomplete(checkpoint, COMMON_FILE, ValueError("it holds no progress"))
    return dict(common)


def read_stored_tensors(checkpoint: Path) -> Metadata:
    """Every tensor of a checkpoint, its parts, and where they lie.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        return read_metadata(checkpoint)
    except (OSError, MetadataError) as error:
        raise _incomplete(checkpoint, METADATA_FILE, error) from error


def _check_backend(checkpoint: Path) -> None:
    try:
        content = json.loads((checkpoint / BACKEND_FILE).read_text(encoding="utf-8"))
        other = {key: v for key, v in content.items() if v != BACKENDS.get(key, v)}
    except (OSError, ValueError, AttributeError) as error:
        raise _incomplete(checkpoint, BACKEND_FILE, error) from error
    if other:
        raise _incomplete(checkpoint, BACKEND_FILE, ValueError(f"it names {other}"))


def _incomplete(checkpoint: Path, name: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        reason = f"{name} is missing"
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"{name} cannot be read, {lines[0].rstrip('.:')}"
    return UserError(
        f"{checkpoint} is not a complete Megatron checkpoint ({reason}): copy it again, or name "
        "another step_... directory, output directory of a run or converted checkpoint."
    )
