"""Folders that are made once per test session, whichever xdist worker needs them first."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all xdist workers of this session see."""
    base = factory.getbasetemp()
    # Workers get a subfolder each.
    return base.parent if base.name.startswith("popen-") else base


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by the first caller; the others wait for it.

    A ``make`` that failed is not tried again: everybody gets its message.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    done, failed = folder.with_suffix(".done"), folder.with_suffix(".failed")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if failed.exists():
            raise AssertionError(f"{folder.name} could not be made: {failed.read_text()}")
        if not done.exists():
            folder.mkdir(exist_ok=True)
            try:
                make(folder)
            except BaseException as error:
                failed.write_text(str(error) or repr(error))
                raise
            done.touch()
    return folder
