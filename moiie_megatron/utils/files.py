"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
