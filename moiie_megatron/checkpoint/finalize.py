"""A checkpoint folder that is complete gets its name, ``latest`` follows, old ones go.

The order is what makes a kill at any moment harmless: the files reach the disk before the name,
the name before the pointer, and the pointer before anything older is removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moiie_megatron.checkpoint.directory import LATEST_FILE, WRITING, step_number
from moiie_megatron.checkpoint.manifest import sync, write_manifest

_REMOVING = ".removing"


def writing_folder(final: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return final.with_name(final.name + WRITING)


def publish(final: Path, *, keep: int) -> None:
    """Name the folder beside ``final`` that way, and keep the newest ``keep`` checkpoints.

    One process calls this, after all have written.
    """
    beside, folder = writing_folder(final), final.parent
    write_manifest(beside)
    if final.exists():
        _remove(final)
    os.replace(beside, final)
    sync(folder)
    pointer = folder / LATEST_FILE
    new_pointer = pointer.with_name(pointer.name + ".writing.txt")
    new_pointer.write_text(final.name + "\n")
    sync(new_pointer)
    os.replace(new_pointer, pointer)
    sync(folder)
    _prune(final, keep)


def _prune(newest: Path, keep: int) -> None:
    """Remove what is older than the ``keep`` newest, and what killed processes left behind.

    Later steps than ``newest`` are there when a run went back; it will write them anew.
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


def _remove(folder: Path) -> None:
    """Take the name away first: what is half removed must not look like a checkpoint."""
    going = folder.with_name(folder.name + _REMOVING)
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    shutil.rmtree(going)
