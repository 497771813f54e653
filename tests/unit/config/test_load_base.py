"""A file laid over another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.config.load import load_config
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import MINIMAL


def _write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def test_values_are_laid_over_those_of_the_base(tmp_path: Path) -> None:
    _write(
        tmp_path,
        below=MINIMAL + "moe: {variant: moiie, top_k: 3}\n",
        above="base: below.yaml\noutput: runs/other\nmoe: {variant: vanilla}\n",
    )

    below, above = (
        load_config(tmp_path / f"{name}.yaml", environ={}) for name in ("below", "above")
    )

    moe = below.moe.model_copy(update={"variant": "vanilla"})
    assert (above.moe.variant, above.moe.top_k) == ("vanilla", 3)
    assert above == below.model_copy(update={"output": "runs/other", "moe": moe})


def test_presets_are_read_after_the_base(tmp_path: Path) -> None:
    """Another preset replaces the base's and keeps what the base says beside it."""
    text = MINIMAL.replace("stage-joint", "stage-joint, template: phi3")
    _write(tmp_path, below=text, above="base: below.yaml\nstage: {preset: stage-moe-only}\n")

    stage = load_config(tmp_path / "above.yaml", environ={}).stage

    assert (stage.name, stage.template) == ("moe-only", "phi3")
    assert stage.learning_rates == {"moe": 2e-5}


def test_lists_replace_and_overrides_win(tmp_path: Path) -> None:
    sources = "data: {sources: [{records: other.json, images: pictures}]}\n"
    _write(tmp_path, below=MINIMAL, above="base: below.yaml\n" + sources)

    config = load_config(tmp_path / "above.yaml", ["data.sequence_length=96"], environ={})

    assert [source.records for source in config.data.sources] == ["other.json"]
    assert (config.data.sequence_length, config.data.tokenizer) == (96, "tokenizer")


def test_bases_follow_each_other_and_name_variables(tmp_path: Path) -> None:
    """Each is relative to the folder of the file that names it."""
    _write(
        tmp_path,
        root=MINIMAL,
        **{
            "one/middle": "base: ../root.yaml\ntrain: {seed: 1, steps: 9}\n",
            "two/top": "base: ../one/${NAME}.yaml\ntrain: {seed: 2}\noutput: ${OUT}\n",
        },
    )

    config = load_config(tmp_path / "two/top.yaml", environ={"NAME": "middle", "OUT": "here"})

    assert (config.train.seed, config.train.steps, config.output) == (2, 9, "here")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("base: 3\n", ("base", "3", "{folder}/run.yaml", "YAML file")),
        ("base:\n", ("base", "None", "{folder}/run.yaml", "YAML file")),
        ("base: other.yaml\n", ("{folder}/other.yaml", "does not exist")),
        ("base: ${NAME}.yaml\n", ("base", "'${{NAME}}.yaml'", "variable NAME")),
        ("base: back.yaml\n", ("base", "run.yaml", "{folder}/back.yaml", "back to a file")),
    ],
)
def test_mistakes(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    _write(tmp_path, run=text, back="base: run.yaml\n")

    with user_error(*(part.format(folder=tmp_path) for part in parts)):
        load_config(tmp_path / "run.yaml", environ={})
