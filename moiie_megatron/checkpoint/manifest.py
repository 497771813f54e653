"""The list of a checkpoint's files, by which a torn or damaged one is told from a whole one.

It is written last, before the folder gets its name.  ``damage`` costs one look at every file and
reading the small ones, whatever the size of the model: a missing, cut or overwritten file is found.
A changed bit in a large file is found when the weights are read (``verify_files.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moiie_megatron.utils.digest import ALGORITHMS, SHA256, XXH3_128, file_digest
from moiie_megatron.utils.errors import UserError

MANIFEST_FILE = "manifest.json"

_DIGEST_UP_TO: Final = 16 << 20  # bytes
_COMMON = (".metadata", "metadata.json", "common.pt")  # in every checkpoint of Megatron-Core
_SHARDS = "*.distcp"
_DIGEST = f".{XXH3_128}"  # ends the name of a file with the digest of a large shard
_THREADS: Final = 4


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint as they were written.

    Args:
        folder: The checkpoint.
        files: By name: size, and the digest under the name of its algorithm.
    """

    folder: Path
    files: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None where there is none: an older program wrote the checkpoint.

        Raises:
            ValueError: It is damaged.
        """
        try:
            files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
            sizes = [entry["bytes"] for entry in files.values()]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{MANIFEST_FILE} cannot be read ({error})") from error
        if not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"{MANIFEST_FILE} cannot be read (a size is no number)")
        return cls(folder, files)

    def fault(self, name: str, *, large: bool = True) -> str | None:
        """What is wrong with a file, in a few words; None if nothing is, or it is not listed.

        Args:
            large: Read it whatever its size.
        """
        entry, path = self.files.get(name), self.folder / name
        if entry is None:
            return None
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if size > _DIGEST_UP_TO and not large:
            return None
        try:
            # A digest is listed under the name of its algorithm.
            algorithms = ALGORITHMS.keys() & entry.keys()
            changed = any(file_digest(path, kind) != entry[kind] for kind in algorithms)
        except UserError:
            return f"{name} cannot be read"
        return f"{name} is not what was written" if changed else None

    def first_fault(self, names: Iterable[str], *, large: bool = True) -> str | None:
        """The first ``fault`` of several files, which are read side by side."""
        with ThreadPoolExecutor(_THREADS) as pool:
            faults = pool.map(lambda name: self.fault(name, large=large), names)
            return next((fault for fault in faults if fault is not None), None)


def note_digests(shards: Iterable[str | Path]) -> None:
    """Write the digest of every large file beside it, for ``write_manifest``.

    Whoever has written the files calls this: they are still in memory.  Where it fails,
    ``write_manifest`` reads the files itself.
    """
    large = [path for path in map(Path, shards) if path.is_file() and _is_large(path)]
    with suppress(OSError, UserError), ThreadPoolExecutor(_THREADS) as pool:
        for path, digest in zip(large, pool.map(_large_digest, large), strict=True):
            _noted(path).write_text(digest)


def write_manifest(folder: Path) -> None:
    """List what a run needs of a complete checkpoint folder, and bring all of it to the disk."""
    files = [*(folder / name for name in _COMMON), *sorted(folder.glob(_SHARDS))]
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = dict(zip((path.name for path in files), pool.map(_entry, files), strict=True))
    for path in files:
        _noted(path).unlink(missing_ok=True)
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": listed}, indent=1) + "\n")
    for path in (*folder.iterdir(), folder):
        sync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is."""
    if not folder.is_dir():
        return "the folder is not there"
    try:
        manifest = Manifest.read(folder)
    except ValueError as error:
        return str(error)
    if manifest is None:
        missing = [name for name in _COMMON if not (folder / name).is_file()]
        return f"{missing[0]} is missing" if missing else None
    return manifest.first_fault(manifest.files, large=False)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if not _is_large(path):
        return {"bytes": size, SHA256: file_digest(path)}
    noted = _noted(path)
    return {"bytes": size, XXH3_128: noted.read_text() if noted.exists() else _large_digest(path)}


def _is_large(path: Path) -> bool:
    return path.stat().st_size > _DIGEST_UP_TO


def _large_digest(path: Path) -> str:
    return file_digest(path, XXH3_128)


def _noted(path: Path) -> Path:
    return path.with_name(path.name + _DIGEST)
