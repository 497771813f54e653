"""Conditions on the data section, and the files, directories and packages that it needs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Literal

from moiie_megatron.config.messages import show
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError


def check_data(config: RunConfig) -> None:
    """Refuse sequence lengths that do not fit the model or the parallel layout.

    Raises:
        UserError: The first impossible value.
    """
    data, parallel = config.data, config.parallel
    if not data.image_token:
        raise UserError("data.image_token is '': use a text such as <image>.")
    needed = config.vision.num_image_tokens + 2
    if data.sequence_length < needed:
        raise UserError(
            f"data.sequence_length is {data.sequence_length}, but one image takes "
            f"{config.vision.num_image_tokens} tokens: use {needed} or more."
        )
    if data.sequence_length > config.language.max_position_embeddings:
        raise UserError(
            f"data.sequence_length is {data.sequence_length} but language.max_position_embeddings "
            f"is {config.language.max_position_embeddings}: use at most that."
        )
    if parallel.sequence_parallel and data.sequence_length % parallel.tensor:
        raise UserError(
            f"data.sequence_length is {data.sequence_length} but sequence parallelism cuts it "
            f"into parallel.tensor = {parallel.tensor} parts: use a multiple of {parallel.tensor}."
        )


def check_packing(config: RunConfig) -> None:
    """Refuse ``data.packing`` with settings that let a sample depend on others in its row.

    Raises:
        UserError: The first such setting.
    """
    if not config.data.packing:
        return
    if config.moe.last_image_token_as_text:
        raise UserError(
            "data.packing is true but moe.last_image_token_as_text is true, which looks from "
            "one token to the next and so past the end of a sample: set one of them to false."
        )
    longrope, length = config.language.longrope, config.data.sequence_length
    if longrope is not None and length > longrope.original_max_position_embeddings:
        raise UserError(
            f"data.packing is true but data.sequence_length is {length} and language.longrope "
            f"changes its factors beyond {longrope.original_max_position_embeddings} positions, "
            "for all samples of a row: set data.packing to false, or data.sequence_length to at "
            f"most {longrope.original_max_position_embeddings}."
        )


def check_loader(config: RunConfig) -> None:
    """Refuse sources that lack what the loader needs.

    Raises:
        UserError: The first such source.
    """
    for number, source in enumerate(config.data.sources):
        if source.images is None and config.data.loader == "plain":
            raise UserError(f"data.sources.{number}.images is missing: give a directory.")


def check_validation(config: RunConfig) -> None:
    """Refuse validation sources that logs could not tell apart.

    Raises:
        UserError: The first such source.
    """
    names = [source.label for source in config.data.validation.sources]
    for number, name in enumerate(names):
        key = f"data.validation.sources.{number}.name"
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError(f"{key} is {name!r}: use letters, digits, ., - and _.")
        if name in names[:number]:
            raise UserError(f"{key} is {name!r}, as that of another source: rename one.")


def check_source_paths(config: RunConfig) -> None:
    """Refuse sources that do not exist, also of validation, and a loader that is not installed.

    Raises:
        UserError: The first missing package, file or directory, with its key.
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
            check_exists(
                f"{key}.records", source.records, "a directory of shards", want="directory"
            )
        elif not source.records.startswith("msc://"):
            raise UserError(
                f"{key}.records is {source.records!r}: energon reaches object storage by the "
                "profiles of its Multi-Storage Client, so use msc://PROFILE/PATH."
            )
        if source.images is not None:
            check_exists(f"{key}.images", source.images, "a directory", want="directory")
    check_validation_paths(config)


def check_validation_paths(config: RunConfig) -> None:
    """Refuse validation sources that do not exist.

    Raises:
        UserError: A file or directory is missing.
    """
    for number, source in enumerate(config.data.validation.sources):
        key = f"data.validation.sources.{number}"
        check_exists(f"{key}.records", source.records, "a file", want="file")
        check_exists(f"{key}.images", source.images, "a directory", want="directory")


def check_exists(
    key: str, path: str, what: str, want: Literal["file", "directory", "any"] = "any"
) -> None:
    """Refuse a path that does not exist or is of another kind.

    Raises:
        UserError: With the key, the path and what to name instead.
    """
    found = Path(path)
    try:
        fits = {"file": found.is_file, "directory": found.is_dir, "any": found.exists}[want]()
        state = f"is not {what}" if found.exists() else "does not exist"
    except OSError as error:  # a name that is too long, a directory that is closed to this user
        fits, state = False, f"cannot be used ({error.strerror})"
    if not fits:
        raise UserError(f"{key} is {show(path)}, which {state}: name {what} that exists.")


def has_energon() -> bool:
    """Whether megatron-energon is installed; nothing of it is imported."""
    try:
        return importlib.util.find_spec("megatron.energon") is not None
    except ModuleNotFoundError:  # Megatron-Core is not installed either
        return False
