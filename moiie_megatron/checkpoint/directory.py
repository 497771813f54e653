"""The files of a checkpoint folder, where to find one, and folders that appear complete or not
at all.  Nothing here needs torch or Megatron.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moiie_megatron.utils.errors import UserError

FORMAT_VERSION = 2  # 1 described the run in sentences (older_progress.py)
CONFIG_FILE = "run.yaml"
REPORT_FILE = "conversion_report.json"
EARLIER_REPORT_FILE = "receipt.json"  # what it was called in version 0.1.0
LATEST_FILE = "latest"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
PROCESSOR_FILES = ("preprocessor_config.json",)

WRITING = ".writing"  # ends the names of folders that are not complete
_SPARE = 64 << 20  # bytes for the small files, and for what others write meanwhile


def checkpoints_folder(output: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(output) / "checkpoints"


def step_folder(output: str | Path, step: int) -> Path:
    """The checkpoint after ``step`` optimizer steps."""
    return checkpoints_folder(output) / f"step_{step:07d}"


def step_number(folder: Path) -> int | None:
    """The step of a checkpoint folder, by its name; None for any other name."""
    match = re.fullmatch(r"step_(\d{7,})", folder.name)
    return int(match[1]) if match else None


def latest_checkpoint(output: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Raises:
        UserError: ``latest`` names a folder that is not there.
    """
    pointer = checkpoints_folder(output) / LATEST_FILE
    if not pointer.exists():
        return None
    folder = pointer.parent / pointer.read_text().strip()
    if not folder.is_dir():
        raise UserError(
            f"{pointer} names the checkpoint {folder.name}, which is not there: restore it, or "
            f"write the name of another step folder into {pointer}."
        )
    return folder


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at ``path``: its own folder, or a run's output folder (its newest one).

    Raises:
        UserError: Neither is there.
    """
    folder = latest_checkpoint(path) or Path(path)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} is no checkpoint: name a step_... folder or the output folder of a run."
        )
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put a tokenizer, and a processor where one lies beside it, into a folder.

    Args:
        source: A folder or a single file.
    """
    if source.is_file():
        shutil.copy(source, folder / source.name)
        return
    for name in (*TOKENIZER_FILES, *PROCESSOR_FILES):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)


def check_output(final: Path, *, force: bool, ours: str) -> None:
    """Refuse an output folder that is there already.

    Args:
        force: It may be replaced, if it is what this program writes.
        ours: A file by which that is recognised.

    Raises:
        UserError: Something is there that may not be replaced.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not force:
        raise UserError(f"{final} exists: name another folder, or replace it with --force.")
    if not (final / ours).is_file():
        raise UserError(
            f"{final} holds no {ours}, so --force does not replace it: name another folder."
        )


@contextmanager
def new_directory(final: Path, *, num_bytes: int, force: bool, ours: str) -> Iterator[Path]:
    """A folder to write into that gets its name only when it is complete.

    It lies beside ``final``; after an error nothing of it is left, after a kill it still has its
    other name (the next attempt removes it).

    Args:
        num_bytes: What is going to be written.
        force, ours: See ``check_output``.

    Raises:
        UserError: ``final`` may not be replaced, the disk is too full, or files cannot be read
            or written meanwhile.
    """
    check_output(final, force=force, ours=ours)
    beside = final.absolute().with_name(final.absolute().name + WRITING)
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{final} cannot be made ({error}): name another folder.") from error
    shutil.rmtree(beside, ignore_errors=True)
    free = shutil.disk_usage(beside.parent).free
    if free < num_bytes + _SPARE:
        raise UserError(
            f"{final} needs {_gigabytes(num_bytes + _SPARE)} but its disk has "
            f"{_gigabytes(free)} free: make room or name a folder on another disk."
        )
    try:
        beside.mkdir()
        yield beside
        check_output(final, force=force, ours=ours)  # others may have written meanwhile
        _replace(beside, final)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{final} could not be written ({error}).") from error
        raise


def _replace(beside: Path, final: Path) -> None:
    """Give ``beside`` its name; what had it goes last, so that one of the two is always there."""
    old = beside.with_suffix(".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(beside, final)
    shutil.rmtree(old, ignore_errors=True)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
