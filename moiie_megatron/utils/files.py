"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it gets its name when the block ends without an error.

    A file of that name is replaced; after an error nothing of the new one is left.

    Yields:
        ``PATH.writing``, which does not exist yet.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".writing")
    try:
        yield beside
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    os.replace(beside, path)
