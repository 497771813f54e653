"""The checkpoint that a run goes on from: the newest whole one, the same on all ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import torch.distributed as dist

from moiie_megatron.checkpoint.directory import LATEST_FILE, checkpoints_directory, step_number
from moiie_megatron.checkpoint.manifest import damage
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.utils.errors import UserError

LOGGER: Final = logging.getLogger(__name__)


def newest_whole(output: str | Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint of a run, and the problems with newer ones.

    The search starts at the step that ``latest`` names: later ones belong to a run that was set
    back, or to a save that did not finish.

    Returns:
        The checkpoint (None: the run has none yet), and a sentence for each problem.

    Raises:
        UserError: There are checkpoints but all of them are damaged.
    """
    directory = checkpoints_directory(output)
    pointer = directory / LATEST_FILE
    found = directory.iterdir() if directory.is_dir() else ()
    steps = {path: step_number(path) for path in found}
    known = sorted(((step, path) for path, step in steps.items() if step is not None), reverse=True)
    if not known and not pointer.exists():
        return None, []
    notes = []
    named = directory / _text(pointer)
    limit = step_number(named)
    if limit is None:
        notes.append(f"{pointer} does not name a checkpoint.")
    elif named not in steps:
        notes.append(f"{pointer} names {named.name}, which is not there.")
    for step, path in known:
        if limit is not None and step > limit:
            continue
        wrong = damage(path)
        if wrong is None:
            return path, notes
        notes.append(f"The checkpoint {path} is damaged: {wrong}.")
    raise UserError(
        f"No checkpoint in {directory} can be used ({' '.join(notes)[:-1]}): restore one, or "
        "remove that directory to start the run again."
    )


def agree_on_newest(output: str | Path, context: ParallelContext) -> Path | None:
    """``newest_whole`` as rank 0 sees it, on every rank; rank 0 logs the problems.

    Raises:
        UserError: See ``newest_whole``; on all ranks.
    """
    found: list[tuple[Path | None, str]] = [(None, "")]
    if context.rank == 0:
        try:
            path, notes = newest_whole(output)
            for note in notes:
                LOGGER.warning("%s", note)
            found = [(path, "")]
        except UserError as error:
            found = [(None, str(error))]
    dist.broadcast_object_list(found, src=0)
    path, problem = found[0]
    if problem:
        raise UserError(problem)
    return path


def _text(path: Path) -> str:
    """The content of a small file; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
