"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moiie_megatron.utils.errors import UserError

WRITING = ".writing"  # ends the names of files and directories that are not complete


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file under another name, and rename it to ``path`` at the end of the block.

    An existing file is replaced; after an error it is kept, and nothing of the new one is left.

    Yields:
        ``PATH.writing``, which does not exist yet.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    beside = path.with_name(path.name + WRITING)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


@contextmanager
def write_output(path: str | Path) -> Iterator[Path]:
    """``atomic_write`` for a file that a user has named; makes its directory.

    Yields:
        See ``atomic_write``.

    Raises:
        UserError: The file, or another one in the block, cannot be read or written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside:
            yield beside
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}): make room there, change its "
            "permissions, or name another place."
        ) from error
