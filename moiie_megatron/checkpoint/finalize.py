"""Gives a complete checkpoint its name, points ``latest`` to it and removes old ones.

A kill at any moment does no harm because of the order: the files reach the disk before the name,
the name before the pointer, and the pointer before anything older is removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moiie_megatron.checkpoint.directory import LATEST_FILE, step_number
from moiie_megatron.checkpoint.manifest import sync, write_manifest
from moiie_megatron.utils.files import WRITING, atomic_write

_REMOVING = ".removing"


def unfinished_directory(final: Path) -> Path:
    """Where the checkpoint ``final`` is written before it gets its name."""
    return final.with_name(final.name + WRITING)


def finalize(final: Path, *, keep: int) -> None:
    """Rename the unfinished directory to ``final``, and keep the newest ``keep`` checkpoints.

    One process calls this, after all ranks have written.
    """
    unfinished, checkpoints = unfinished_directory(final), final.parent
    write_manifest(unfinished)
    if final.exists():
        _remove(final)
    os.replace(unfinished, final)
    sync(checkpoints)
    with atomic_write(checkpoints / LATEST_FILE) as pointer:
        pointer.write_text(final.name + "\n")
        sync(pointer)
    sync(checkpoints)
    _prune(final, keep)


def _prune(newest: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints, and what killed processes left behind.

    Checkpoints later than ``newest`` exist where a run went back; it will write them again.
    """
    steps = {path: step_number(path) for path in newest.parent.iterdir()}
    limit = step_number(newest)
    assert limit is not None
    known = sorted(
        (step, path) for path, step in steps.items() if step is not None and step <= limit
    )
    for _, old in known[:-keep]:
        _remove(old)
    for path in newest.parent.glob("step_*"):
        if path.suffix in (WRITING, _REMOVING):
            shutil.rmtree(path)


def _remove(checkpoint: Path) -> None:
    """Rename before removing: half a checkpoint must not look like a whole one."""
    doomed = checkpoint.with_name(checkpoint.name + _REMOVING)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)
