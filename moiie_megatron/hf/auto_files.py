"""What turns a directory with weights into one that transformers loads: code and ``auto_map``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

_HERE: Final = Path(__file__).parent

REMOTE_FILES: Final = (
    "cache_moiie.py",
    "configuration_moiie.py",
    "language_moiie.py",
    "modeling_moiie.py",
    "pixels_moiie.py",
    "processing_moiie.py",
    "token_types_moiie.py",
    "version_moiie.py",
)
AUTO_MAP: Final = {
    "AutoConfig": "configuration_moiie.MoiieConfig",
    "AutoModel": "modeling_moiie.MoiieModel",
    "AutoModelForImageTextToText": "modeling_moiie.MoiieForConditionalGeneration",
    "AutoProcessor": "processing_moiie.MoiieProcessor",
}
# transformers looks into config.json for models and into these for the processor.
_CONFIGS: Final = ("config.json", "processor_config.json")


def write_remote_code(directory: str | Path) -> list[Path]:
    """Copy the remote-code files into a directory and name their classes in its configs.

    ``config.json`` and ``processor_config.json`` get an ``auto_map`` where they exist: call this
    after writing them.

    Returns:
        The files written.

    Raises:
        ValueError: No such directory, or a config in it that is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"There is no directory {directory}: create it first.")
    contents = {directory / name: (_HERE / name).read_text("utf-8") for name in REMOTE_FILES}
    for name in _CONFIGS:
        file = directory / name
        if file.is_file():
            contents[file] = json.dumps(_read(file) | {"auto_map": AUTO_MAP}, indent=2) + "\n"
    for file, text in contents.items():
        beside = file.with_name(f".{file.name}.writing")
        beside.write_text(text, "utf-8")
        os.replace(beside, file)
    return list(contents)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}): write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object: write it again.")
    return content
