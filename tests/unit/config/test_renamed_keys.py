"""Saved configurations of earlier versions are read with the keys of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moiie_megatron.config.load import dump_config, load_saved_config
from tests.unit.config.minimal import load_minimal


@pytest.mark.parametrize(
    ("stages", "ends", "layers"),
    [
        (2, {"first": 1}, [1, 3]),
        (2, {"last": 1}, [3, 1]),
        (3, {"first": 1, "last": 2}, [1, 1, 2]),
        (2, {"first": 1, "last": 3}, [1, 3]),
        (2, {}, None),
    ],
)
def test_layers_of_the_first_and_last_stage(
    stages: int, ends: dict[str, int], layers: list[int] | None, tmp_path: Path
) -> None:
    saved: dict[str, Any] = yaml.safe_load(dump_config(load_minimal(tmp_path)))
    saved["parallel"]["pipeline"] = stages
    saved["megatron"] = {f"num_layers_in_{end}_pipeline_stage": n for end, n in ends.items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    config = load_saved_config(tmp_path / "config.yaml")
    assert config.parallel.pipeline_layers == layers and config.megatron == {}
    # Tools choose their own layout.
    assert load_saved_config(tmp_path / "config.yaml", ["parallel={}"]).parallel.pipeline == 1
