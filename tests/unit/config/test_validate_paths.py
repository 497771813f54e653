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


def _existing_data(folder: Path) -> list[str]:
    """Overrides with records, images and a tokenizer that exist."""
    for name in ("tokenizer", "images"):
        (folder / name).mkdir()
    records = folder / "records.json"
    records.touch()
    return [
        f"data.sources=[{{records: {records}, images: {folder}/images}}]",
        f"data.tokenizer={folder}/tokenizer",
    ]


def test_held_out_samples(tmp_path: Path) -> None:
    base = _existing_data(tmp_path)

    def config(records: str, images: str) -> RunConfig:
        source = f"{{records: {tmp_path}/{records}, images: {tmp_path}/{images}}}"
        return load_minimal(tmp_path, [*base, f"data.validation.sources=[{source}]"])

    check_paths(config("records.json", "images"))
    with user_error("data.validation.sources.0.records", tmp_path / "gone.json"):
        check_paths(config("gone.json", "images"))
    with user_error("data.validation.sources.0.images", tmp_path / "gone"):
        check_paths(config("records.json", "gone"))
    listed = tmp_path / "held_out.yaml"
    listed.write_text("- {records: r.json, images: i}\n")
    named = load_minimal(tmp_path, [*base, f"data.validation.sources={listed}"])
    assert [source.label for source in named.data.validation.sources] == ["r"]
    listed.write_text("records: r.json\n")
    with user_error("data.validation.sources", listed, "a list"):
        load_minimal(tmp_path, [*base, f"data.validation.sources={listed}"])


def test_sets_to_evaluate(tmp_path: Path) -> None:
    """They are looked for where the run starts the process that evaluates, and only there."""
    base = [*_existing_data(tmp_path), "checkpoint.interval=10"]

    def config(questions: str, images: str, *overrides: str) -> RunConfig:
        one = f"{{name: a, records: {tmp_path}/{questions}, images: {tmp_path}/{images}}}"
        return load_minimal(tmp_path, [*base, f"evaluation.sets=[{one}]", *overrides])

    on = "evaluation.interval=10"
    check_paths(config("records.json", "images", on))
    for wrong in (("gone.json", "images"), ("images", "images")):
        with user_error("evaluation.sets.0.records", tmp_path / wrong[0]):
            check_paths(config(*wrong, on))
    with user_error("evaluation.sets.0.images", tmp_path / "gone"):
        check_paths(config("records.json", "gone", on))
    with user_error("evaluation.task_data", "nowhere"):
        check_paths(config("records.json", "images", on, "evaluation.task_data=nowhere"))
    check_paths(config("gone.json", "gone"))
    check_paths(config("gone.json", "gone", on, "evaluation.process=false"))
