"""Which checkpoint a run goes on from: the newest that is whole, the same on all ranks."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from moiie_megatron.checkpoint.directory import LATEST_FILE, checkpoints_folder, step_number
from moiie_megatron.checkpoint.manifest import damage
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.utils.errors import UserError


def newest_whole(output: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is not damaged, and what was found on the way.

    ``latest`` says where to begin: later steps are of a run that was taken back, or of a save
    that did not come to its end.

    Returns:
        The folder (None: the run has no checkpoint yet), and a sentence for each thing that was
        not as it should be.

    Raises:
        UserError: There are checkpoints but all of them are damaged.
    """
    folder = checkpoints_folder(output)
    pointer = folder / LATEST_FILE
    steps = {path: step_number(path) for path in (folder.iterdir() if folder.is_dir() else ())}
    known = sorted(((step, path) for path, step in steps.items() if step is not None), reverse=True)
    if not known and not pointer.exists():
        return None, []
    notes = []
    named = folder / _text(pointer)
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
        f"No checkpoint in {folder} can be used ({' '.join(notes)[:-1]}): restore one, or remove "
        "that folder to start the run again."
    )


def agree_on_newest(output: str | Path, context: ParallelContext) -> Path | None:
    """``newest_whole`` as rank 0 sees it, on every rank; rank 0 says what it passed over.

    Raises:
        UserError: See ``newest_whole``; on all ranks.
    """
    found: list[tuple[Path | None, str]] = [(None, "")]
    if context.rank == 0:
        try:
            path, notes = newest_whole(output)
            for note in notes:
                print(f"warning: {note}", flush=True)
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
