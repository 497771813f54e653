"""Which checkpoints of a run are complete, and whether one is the last."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from moiie_megatron.checkpoint.directory import LATEST_FILE, checkpoints_directory, step_number
from moiie_megatron.checkpoint.manifest import MANIFEST_FILE
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.stored_state import read_common
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint that has got its name, so all its files were written.

    Attributes:
        step: Steps done.
        path: Its directory.
        digest: Of the list of its files with their digests.
    """

    step: int
    path: Path
    digest: str


def saved_steps(output: Path) -> list[SavedStep]:
    """The checkpoints up to the one that ``latest`` names, by step.

    Later ones belong to a course of the run that was given up.
    """
    directory = checkpoints_directory(output)
    try:
        newest = step_number(directory / (directory / LATEST_FILE).read_text().strip())
        found = {path: step_number(path) for path in directory.iterdir()}
    except OSError:  # none yet, or out of reach for a while
        return []
    steps = []
    for path, step in found.items():
        if step is None or newest is None or step > newest:
            continue
        try:
            manifest = (path / MANIFEST_FILE).read_bytes()
        except OSError:  # just removed; or of a version before there were manifests
            manifest = b""
        steps.append(SavedStep(step, path, hashlib.sha256(manifest).hexdigest()))
    return sorted(steps, key=lambda one: one.step)


def last_step(checkpoint: Path) -> int | None:
    """The step at which the run of a checkpoint ends; None if the checkpoint does not tell."""
    try:
        identity = Progress.from_state(read_common(checkpoint)["progress"]).identity
        return int(identity["schedule"]["steps"])
    except (UserError, KeyError, TypeError, ValueError, OSError):
        return None
