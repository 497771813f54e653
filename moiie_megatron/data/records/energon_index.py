"""What megatron-energon wants beside tar shards: its own index, made by its own code."""

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


def index_shards(folder: Path, shards: Sequence[str]) -> bool:
    """Say what the shards hold, and index them for training if energon is there.

    Returns:
        Whether they were indexed; without that energon cannot read them yet.
    """
    (folder / _META).mkdir(exist_ok=True)
    (folder / DATASET_FILE).write_text(_DATASET)
    if not has_energon():
        return False
    from megatron.energon.epathlib import EPath  # type: ignore[import-not-found]
    from megatron.energon.flavors import BaseWebdatasetFactory  # type: ignore[import-not-found]

    with redirect_stdout(io.StringIO()):  # it reports every step
        BaseWebdatasetFactory.prepare_dataset(
            EPath(str(folder.absolute())),
            list(shards),
            split_parts_ratio=[("train", 1), ("val", 0), ("test", 0)],
            shuffle_seed=None,
            workers=1,
        )
    return True
