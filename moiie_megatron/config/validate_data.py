"""What the two back ends of the data need: files, folders, packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError


def check_loader(config: RunConfig) -> None:
    """Refuse sources without what the back end needs.

    Raises:
        UserError: The first such source.
    """
    for number, source in enumerate(config.data.sources):
        if source.images is None and config.data.loader == "plain":
            raise UserError(f"data.sources.{number}.images is missing: give a folder.")


def check_source_paths(config: RunConfig) -> None:
    """Refuse sources that do not exist, and a back end that is not installed.

    Raises:
        UserError: The first missing package, file or folder, with its key.
    """
    if config.data.loader == "energon" and not has_energon():
        raise UserError(
            "data.loader is energon, but megatron-energon is not installed: pip install "
            "'moiie-megatron[energon]', or set data.loader to plain."
        )
    for number, source in enumerate(config.data.sources):
        key = f"data.sources.{number}"
        if config.data.loader == "plain":
            check_exists(f"{key}.records", source.records, "a file", want="file")
        elif "://" not in source.records:
            check_exists(f"{key}.records", source.records, "a folder of shards", want="folder")
        elif not source.records.startswith("msc://"):
            raise UserError(
                f"{key}.records is {source.records!r}: energon reaches object storage by the "
                "profiles of its Multi-Storage Client, so use msc://PROFILE/PATH."
            )
        if source.images is not None:
            check_exists(f"{key}.images", source.images, "a folder", want="folder")


def check_exists(
    key: str, path: str, what: str, want: Literal["file", "folder", "any"] = "any"
) -> None:
    """Refuse a path that is not there, or is something else.

    Raises:
        UserError: With the key, the path and what it should be.
    """
    found = Path(path)
    fits = {"file": found.is_file, "folder": found.is_dir, "any": found.exists}[want]()
    if not fits:
        state = f"is not {what}" if found.exists() else "does not exist"
        raise UserError(f"{key} is {path!r}, which {state}: name {what} that exists.")


def has_energon() -> bool:
    """Whether megatron-energon is installed; nothing of it is imported."""
    try:
        return importlib.util.find_spec("megatron.energon") is not None
    except ModuleNotFoundError:  # not even Megatron
        return False
