"""The files of a checkpoint, and where to find one.  Nothing here needs torch or Megatron."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from moiie_megatron.data.encode.stop_ids import GENERATION_FILE
from moiie_megatron.data.vocabulary.tokenizer_files import tokenizer_files
from moiie_megatron.utils.errors import UserError

FORMAT_VERSION = 2  # 1 described the run in sentences (older_progress.py)
CONFIG_FILE = "run.yaml"
REPORT_FILE = "conversion_report.json"
EARLIER_REPORT_FILE = "receipt.json"  # what it was called in version 0.1.0
LATEST_FILE = "latest"
PROCESSOR_FILES = ("preprocessor_config.json",)


def checkpoints_directory(output: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(output) / "checkpoints"


def step_directory(output: str | Path, step: int) -> Path:
    """The checkpoint after ``step`` optimizer steps."""
    return checkpoints_directory(output) / f"step_{step:07d}"


def step_number(directory: Path) -> int | None:
    """The step in the name of a checkpoint; None for any other name."""
    match = re.fullmatch(r"step_(\d{7,})", directory.name)
    return int(match[1]) if match else None


def latest_checkpoint(output: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Raises:
        UserError: ``latest`` names a directory that is not there.
    """
    pointer = checkpoints_directory(output) / LATEST_FILE
    if not pointer.exists():
        return None
    directory = pointer.parent / pointer.read_text().strip()
    if not directory.is_dir():
        raise UserError(
            f"{pointer} names the checkpoint {directory.name}, which is not there: restore it, or "
            f"write the name of another step directory into {pointer}."
        )
    return directory


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at ``path``: its own directory, or a run's output directory (the newest).

    Raises:
        UserError: Neither is there.
    """
    directory = latest_checkpoint(path) or Path(path)
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} is no checkpoint: name a step_... directory or the output directory of a run."
        )
    return directory


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy a tokenizer, and a processor if one lies beside it, into a directory.

    The copy is read as the source is (``data/vocabulary/tokenizer_files.py``).  The ids at which a
    model stops come along: out of its ``config.json`` where it has no ``generation_config.json``,
    as in transformers.

    Args:
        source: A directory or a single file; a directory may have no tokenizer.
    """
    files: dict[str, Path] = {}
    with suppress(UserError):
        files = tokenizer_files(source).copies()
    if source.is_dir():
        files |= {name: source / name for name in PROCESSOR_FILES if (source / name).exists()}
    for name, file in files.items():
        shutil.copy(file, directory / name)
    if source.is_dir() and GENERATION_FILE not in files:
        ends = _model_ends(source / "config.json")
        if ends is not None:
            (directory / GENERATION_FILE).write_text(json.dumps({"eos_token_id": ends}) + "\n")


def _model_ends(file: Path) -> Any:
    """``eos_token_id`` of a model's configuration, if there is one that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("eos_token_id") if isinstance(content, dict) else None
