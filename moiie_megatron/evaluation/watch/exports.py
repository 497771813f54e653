"""The exports of evaluated checkpoints, beside the run: ``OUTPUT/exports/step_...``."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

from moiie_megatron.checkpoint.directory import step_number
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.evaluation.watch.checkpoints import SavedStep
from moiie_megatron.training.logging.evaluations import Evaluated
from moiie_megatron.utils.files import WRITING, atomic_write
from moiie_megatron.utils.progress import NoteFn, ProgressFn

DIRECTORY: Final = "exports"
_SOURCE: Final = "exported_from.json"  # says that the export is whole, and of which checkpoint
_REMOVING: Final = ".removing"


def export_step(
    output: Path, saved: SavedStep, progress: ProgressFn | None = None, note: NoteFn | None = None
) -> Path:
    """The export of a checkpoint; one that is there already is taken.

    Raises:
        UserError, OSError: See ``export_checkpoint``; or the checkpoint is removed meanwhile.
    """
    folder = output / DIRECTORY / saved.path.name
    source = {"checkpoint": saved.path.name, "digest": saved.digest}
    try:
        if json.loads((folder / _SOURCE).read_bytes()) == source:
            return folder
    except (OSError, ValueError):
        pass
    if folder.exists():
        _remove(folder)
    export_checkpoint(saved.path, folder, progress=progress, note=note)
    with atomic_write(folder / _SOURCE) as file:
        file.write_text(json.dumps(source) + "\n")
    return folder


def prune_exports(
    output: Path, results: Sequence[Evaluated], names: Collection[str], keep: int
) -> None:
    """Keep the newest exports and the best one, whose scores have the highest mean.

    Args:
        output: The output directory of the run.
        results: All there are.
        names: Sets and tasks that count for the mean; steps without all of them have none.
        keep: Number of newest exports.
    """
    directory = output / DIRECTORY
    found = {path: step_number(path) for path in directory.iterdir()}
    steps = sorted(step for step in found.values() if step is not None)
    kept = {*steps[max(len(steps) - keep, 0) :], *_best(results, names, steps)}
    for path, step in found.items():
        if path.suffix in (WRITING, _REMOVING):  # a kill has left it
            shutil.rmtree(path, ignore_errors=True)
        elif step is not None and step not in kept:
            _remove(path)


def _best(
    results: Sequence[Evaluated], names: Collection[str], steps: Collection[int]
) -> list[int]:
    """The step with the best scores; of equal ones the last."""
    scores: dict[int, dict[str, float]] = defaultdict(dict)
    for one in results:
        if one.name in names and one.step in steps:
            scores[one.step][one.name] = one.value
    means = {step: fmean(by.values()) for step, by in scores.items() if len(by) == len(names)}
    return [max(means, key=lambda step: (means[step], step))] if means else []


def _remove(folder: Path) -> None:
    """Rename before removing: half an export must not look like a whole one."""
    doomed = folder.with_name(folder.name + _REMOVING)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
