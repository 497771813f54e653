"""Hundreds of configurations with wrong values, seeded: a configuration or one sentence."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import get_args

import pytest
from pydantic import BaseModel

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError
from tests.helpers.fuzz import damaged, time_limit
from tests.unit.config.minimal import MINIMAL

ROUNDS = 250
PAIRS = 80
VALUES = [
    "null", "true", "0", "-1", "1", "2", "3.5", "-0.0", "1e-300", "1e999", ".nan", ".inf", "-.inf",
    "''", "' '", "text", "[]", "[1, 2]", "{}", "{a: 1}", "[[[]]]", "2020-01-01", "0x1F", "1_000",
    "~", "!!binary aGk=", "[{records: a.json, images: b}]", "[{}]", "[null]", "'${NONE}'",
]  # fmt: skip


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys of the schema, ``section.key`` each."""
    for name, field in model.model_fields.items():
        kinds = (
            get_args(field.annotation)
            if isinstance(field.annotation, UnionType)
            else (field.annotation,)
        )
        yield prefix + name
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{name}.")


def load(path: Path, overrides: list[str]) -> None:
    with time_limit(5):
        try:
            assert isinstance(load_config(path, overrides, environ={}), RunConfig)
        except UserError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 1500, text


def test_wrong_values(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    pairs = list(itertools.product(keys(RunConfig), VALUES))
    assert len(pairs) > 3000
    for key, value in random.Random(0).sample(pairs, PAIRS):
        load(path, [f"{key}={value}"])


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
