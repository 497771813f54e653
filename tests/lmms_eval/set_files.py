"""Data sets as files: a Parquet file for each split, and a README card that names them.

Imported in lmms-eval's environment, which has ``datasets``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from sklearn.datasets import load_digits

_DIGITS = load_digits().images
STRING = Value("string")

Rows = Sequence[Mapping[str, Any]]


def digit(row: int) -> Pillow.Image:
    """The scanned digit of a row of the built-in data set, at 64 x 64 pixels."""
    pixels = (_DIGITS[row] * 15).astype(np.uint8)
    return Pillow.fromarray(pixels).resize((64, 64)).convert("RGB")


def write(folder: Path, rows: Rows, split: str, config: str | None = None, **types: Any) -> None:
    """One split of one configuration, with what the README card says about it.

    Args:
        types: Features of columns that are neither text nor a picture under ``image``.
    """
    names = rows[0].keys()
    features = {name: types.get(name, Image() if name == "image" else STRING) for name in names}
    directory = folder / (config or "data")
    directory.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list([dict(row) for row in rows], features=Features(features))
    data.to_parquet(directory / f"{split}-00000-of-00001.parquet")
    _describe(folder / "README.md", config or "default", split, f"{directory.name}/{split}-*")


def _describe(readme: Path, config: str, split: str, path: str) -> None:
    """Add a split to the README card."""
    card = yaml.safe_load(readme.read_text().split("---")[1]) if readme.exists() else {}
    files = {entry["config_name"]: entry["data_files"] for entry in card.get("configs", [])}
    files.setdefault(config, []).append({"split": split, "path": path})
    entries = [{"config_name": name, "data_files": parts} for name, parts in files.items()]
    readme.write_text(f"---\n{yaml.safe_dump({'configs': entries}, sort_keys=False)}---\n")
