"""What is said about sources that a back end cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.config import validate_data
from moiie_megatron.config.validate import check_paths
from tests.unit.config.minimal import load_minimal

SHARDS = ["data.loader=energon", "data.sources=[{records: shards}]", "data.tokenizer=t"]


def test_the_plain_loader_needs_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.sources.1.images is missing: give a directory."):
        load_minimal(tmp_path, ["data.sources=[{records: a, images: b}, {records: c}]"])
    with pytest.raises(ValueError, match="data.loader is 'webdataset': use plain or energon"):
        load_minimal(tmp_path, ["data.loader=webdataset"])


def test_energon_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate_data, "has_energon", lambda: False)
    config = load_minimal(tmp_path, SHARDS)  # a converter may read it all the same
    with pytest.raises(ValueError) as caught:
        check_paths(config)
    assert str(caught.value) == (
        "data.loader is energon, but megatron-energon is not installed: pip install "
        "'moiie-megatron[energon]', or set data.loader to plain."
    )


def test_shards_are_a_folder_or_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate_data, "has_energon", lambda: True)
    with pytest.raises(
        ValueError, match="data.sources.0.records is 'shards', which does not exist"
    ):
        check_paths(load_minimal(tmp_path, SHARDS))
    (tmp_path / "shards").mkdir()
    check_paths(load_minimal(tmp_path, SHARDS))
    check_paths(load_minimal(tmp_path, [*SHARDS, "data.sources=[{records: 'msc://me/shards'}]"]))
    with pytest.raises(ValueError, match="'s3://me/shards': .*so use msc://PROFILE/PATH"):
        check_paths(load_minimal(tmp_path, [*SHARDS, "data.sources=[{records: 's3://me/shards'}]"]))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is 'file', which is not a directory of shards"):
        check_paths(load_minimal(tmp_path, [*SHARDS, "data.sources=[{records: file}]"]))
