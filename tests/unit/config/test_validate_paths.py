"""What is said about files and directories that are not there."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_paths
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import load_minimal


def test_paths(tmp_path: Path) -> None:
    def config(*overrides: str) -> RunConfig:
        return load_minimal(
            tmp_path,
            [
                f"data.sources=[{{records: {tmp_path}/r.json, images: {tmp_path}/images}}]",
                f"data.tokenizer={tmp_path}/tokenizer.model",
                *overrides,
            ],
        )

    def refuses(*parts: object, overrides: tuple[str, ...] = ()) -> None:
        with user_error(*parts):
            check_paths(config(*overrides))

    refuses("data.sources", "empty", "at least one", overrides=("data.sources=[]",))
    tokenizer = tmp_path / "tokenizer.model"
    refuses("data.tokenizer", tokenizer, "does not exist")
    tokenizer.touch()
    records = tmp_path / "r.json"
    refuses("data.sources.0.records", records, "does not exist")
    records.mkdir()
    refuses("data.sources.0.records", records, "not a file")
    records.rmdir()
    records.touch()
    refuses("data.sources.0.images", tmp_path / "images", "does not exist")
    (tmp_path / "images").mkdir()
    check_paths(config())
    for key in ("language.pretrained", "vision.pretrained", "checkpoint.init_from"):
        refuses(key, tmp_path / "w", "does not exist", overrides=(f"{key}={tmp_path}/w",))
        refuses(key, tokenizer, "not a directory", overrides=(f"{key}={tokenizer}",))
        check_paths(config(f"{key}={tmp_path}/images"))
