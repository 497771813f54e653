"""Hundreds of damaged configuration files, seeded: a configuration or one sentence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError
from tests.helpers.fuzz import damaged, time_limit
from tests.unit.config.minimal import MINIMAL

ROUNDS = 250


def load(path: Path, overrides: list[str]) -> None:
    with time_limit(5):
        try:
            assert isinstance(load_config(path, overrides, environ={}), RunConfig)
        except UserError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 1500, text


def test_damaged_files(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "run.yaml"
    for _ in range(ROUNDS):
        path.write_bytes(damaged(MINIMAL.encode(), draw))
        load(path, [])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(MINIMAL.encode(encoding))
    load(path, [])
