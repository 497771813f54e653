"""The list of a checkpoint's files, by which a torn or damaged one is told from a whole one.

It is written last, before the folder gets its name.  Checking it costs one look at every file
and reading the small ones, whatever the size of the model: a missing, cut or overwritten file
is found, a changed bit inside a large file of tensors is not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moiie_megatron.utils.digest import ALGORITHMS, SHA256, file_digest
from moiie_megatron.utils.errors import UserError

MANIFEST_FILE = "manifest.json"

_DIGEST_UP_TO = 16 << 20  # bytes; larger files are known by their size alone
_COMMON = (".metadata", "metadata.json", "common.pt")  # in every checkpoint of Megatron-Core
_SHARDS = "*.distcp"


def write_manifest(folder: Path) -> None:
    """List what a run needs of a complete checkpoint folder, and bring all of it to the disk."""
    files = [*(folder / name for name in _COMMON), *sorted(folder.glob(_SHARDS))]
    listed = {path.name: _entry(path) for path in files}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": listed}, indent=1) + "\n")
    for path in (*folder.iterdir(), folder):
        sync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is."""
    if not folder.is_dir():
        return "the folder is not there"
    manifest = folder / MANIFEST_FILE
    if not manifest.exists():
        # Written by an older program.
        missing = [name for name in _COMMON if not (folder / name).is_file()]
        return f"{missing[0]} is missing" if missing else None
    try:
        listed = json.loads(manifest.read_text())["files"]
        return next((why for name in listed if (why := _fault(folder, name, listed[name]))), None)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size} | ({SHA256: file_digest(path)} if size <= _DIGEST_UP_TO else {})


def _fault(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} has {size} bytes instead of {entry['bytes']}"
    try:
        # A digest is listed under the name of its algorithm.
        algorithms = ALGORITHMS.keys() & entry.keys()
        changed = any(file_digest(path, kind) != entry[kind] for kind in algorithms)
    except UserError:
        return f"{name} cannot be read"
    return f"{name} is not what was written" if changed else None
