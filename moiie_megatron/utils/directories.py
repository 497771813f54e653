"""Directories that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import WRITING

_SPARE = 64 << 20  # bytes for small files, and for what other programs write meanwhile


def check_output(final: Path, *, force: bool, marker: str) -> None:
    """Refuse an output directory that exists and is not empty.

    Args:
        force: It may be replaced if it holds ``marker``.
        marker: A file that only directories written by this program have.

    Raises:
        UserError: It may not be replaced.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not force:
        raise UserError(f"{final} exists: name another directory, or replace it with --force.")
    if not (final / marker).is_file():
        raise UserError(
            f"{final} holds no {marker}, so --force does not replace it: name another directory."
        )


@contextmanager
def new_directory(final: Path, *, num_bytes: int, force: bool, marker: str) -> Iterator[Path]:
    """Write a directory under another name, and give it its own name when it is complete.

    After an error nothing of it is left.  After a kill it still has its other name, and the next
    attempt removes it.

    Args:
        num_bytes: Size of what will be written.
        force, marker: See ``check_output``.

    Yields:
        ``FINAL.writing``, empty.

    Raises:
        UserError: ``final`` may not be replaced, the disk is too full, or a file cannot be read
            or written in the block.
    """
    check_output(final, force=force, marker=marker)
    unfinished = final.absolute().with_name(final.absolute().name + WRITING)
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{final} cannot be made ({error}): name another directory.") from error
    shutil.rmtree(unfinished, ignore_errors=True)
    free = shutil.disk_usage(unfinished.parent).free
    if free < num_bytes + _SPARE:
        raise UserError(
            f"{final} needs {_gigabytes(num_bytes + _SPARE)} but its disk has "
            f"{_gigabytes(free)} free: make room or name a directory on another disk."
        )
    try:
        unfinished.mkdir()
        yield unfinished
        check_output(final, force=force, marker=marker)  # others may have written meanwhile
        _replace(unfinished, final)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{final} could not be written ({error}).") from error
        raise


def _replace(unfinished: Path, final: Path) -> None:
    """Rename ``unfinished``; the old directory goes last, so that one of the two always exists."""
    old = unfinished.with_suffix(".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(unfinished, final)
    shutil.rmtree(old, ignore_errors=True)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
