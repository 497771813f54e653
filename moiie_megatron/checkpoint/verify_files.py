"""Are the files of a checkpoint what was written?  Asked before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from moiie_megatron.checkpoint.manifest import Manifest
from moiie_megatron.checkpoint.stored_state import read_stored_tensors
from moiie_megatron.utils.errors import UserError

if TYPE_CHECKING:
    from moiie_megatron.mcore.parallel import ParallelContext


def verify_files(checkpoint: Path, context: ParallelContext) -> None:
    """Compare every file with its digest in the manifest; every rank calls this.

    The files are divided among the ranks: each is read once more, by one of them.  Without a
    manifest only missing and cut shards are found.

    Raises:
        UserError: A file is missing, cut off or changed; on all ranks.
    """
    faults: list[str | None] = [None] * context.size
    dist.all_gather_object(faults, _fault(checkpoint, context.rank, context.size))
    for fault in faults:
        if fault is not None:
            raise damaged(checkpoint, fault)


def check_shards(checkpoint: Path) -> str | None:
    """The first shard that is missing or cut off, in a few words."""
    ends: dict[str, int] = {}
    for place in read_stored_tensors(checkpoint).storage_data.values():
        end = place.offset + place.length
        ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
    for name, end in ends.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < end:
            return f"{name} is cut off"
    return None


def damaged(checkpoint: Path, fault: str) -> UserError:
    """The error about a file that is not what was written."""
    return UserError(
        f"The checkpoint {checkpoint} is damaged ({fault}): copy it again, or remove the directory "
        "to use an earlier one."
    )


def _fault(checkpoint: Path, rank: int, size: int) -> str | None:
    try:
        manifest = Manifest.read(checkpoint)
    except ValueError as error:
        return str(error)
    if manifest is None:
        return check_shards(checkpoint)  # by all ranks: an error must not leave others waiting
    # Large files first, so that every rank gets some of them.
    names = sorted(manifest.files, key=lambda name: -manifest.files[name]["bytes"])
    return manifest.first_fault(names[rank::size])
