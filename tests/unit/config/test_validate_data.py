"""What is said about sources that a back end cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.config import validate_data
from moiie_megatron.config.validate import check_paths
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import load_minimal

SHARDS = ["data.loader=energon", "data.sources=[{records: shards}]", "data.tokenizer=t"]


def test_the_plain_loader_needs_images(tmp_path: Path) -> None:
    with user_error("data.sources.1.images", "missing", "directory"):
        load_minimal(tmp_path, ["data.sources=[{records: a, images: b}, {records: c}]"])
    with user_error("data.loader", "'webdataset'", "plain or energon"):
        load_minimal(tmp_path, ["data.loader=webdataset"])


def test_energon_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate_data, "has_energon", lambda: False)
    config = load_minimal(tmp_path, SHARDS)  # a converter may read it all the same
    with user_error("data.loader", "energon", "pip install 'moiie-megatron[energon]'", "plain"):
        check_paths(config)


def test_shards_are_a_folder_or_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate_data, "has_energon", lambda: True)
    with user_error("data.sources.0.records", "'shards'", "does not exist"):
        check_paths(load_minimal(tmp_path, SHARDS))
    (tmp_path / "shards").mkdir()
    check_paths(load_minimal(tmp_path, SHARDS))
    check_paths(load_minimal(tmp_path, [*SHARDS, "data.sources=[{records: 'msc://me/shards'}]"]))
    with user_error("'s3://me/shards'", "msc://PROFILE/PATH"):
        check_paths(load_minimal(tmp_path, [*SHARDS, "data.sources=[{records: 's3://me/shards'}]"]))
    (tmp_path / "file").touch()
    with user_error("data.sources.0.records", "'file'", "directory"):
        check_paths(load_minimal(tmp_path, [*SHARDS, "data.sources=[{records: file}]"]))


@pytest.mark.parametrize(
    ("sources", "parts"),
    [
        ("[{records: a b.json, images: i}]", ["sources.0.name", "'a b'", "letters"]),
        ("[{records: x/a.json, images: i}, {records: y/a.json, images: i}]", ["sources.1", "'a'"]),
        ("[{records: a.json}]", ["sources.0.images"]),
        ("[{records: a.json, images: i, weight: 2}]", ["sources.0.weight"]),
    ],
)
def test_validation_sources(sources: str, parts: list[str], tmp_path: Path) -> None:
    with user_error(*parts):
        load_minimal(tmp_path, [f"data.validation.sources={sources}"])
