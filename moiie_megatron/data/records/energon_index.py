"""The index that megatron-energon needs beside tar shards, written by energon itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Final

from moiie_megatron.config.validate_data import has_energon

_META: Final = ".nv-meta"
DATASET_FILE: Final = f"{_META}/dataset.yaml"
_DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def index_shards(directory: Path, shards: Sequence[str]) -> bool:
    """Declare the type of the shards, and index them for training if energon is installed.

    Args:
        directory: Holds the shards.
        shards: Their names.

    Returns:
        Whether the shards were indexed; energon cannot read them without an index.
    """
    (directory / _META).mkdir(exist_ok=True)
    (directory / DATASET_FILE).write_text(_DATASET)
    if not has_energon():
        return False
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors import BaseWebdatasetFactory

    with redirect_stdout(io.StringIO()):  # it prints its progress
        BaseWebdatasetFactory.prepare_dataset(
            EPath(str(directory.absolute())),
            list(shards),
            split_parts_ratio=[("train", 1), ("val", 0), ("test", 0)],
            shuffle_seed=None,
            workers=1,
        )
    return True
