"""Every mistake in a configuration is one sentence with the key, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.config.load import load_config
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import MINIMAL, load_minimal


def _refuses(tmp_path: Path, overrides: list[str], *parts: str, text: str = MINIMAL) -> None:
    with user_error(*parts):
        load_minimal(tmp_path, overrides, text=text)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "language.hiden_size=3",
            ("language.hiden_size", "did you mean hidden_size"),
        ),
        ("trian.steps=3", ("trian", "did you mean train")),
        (
            "checkpoint.zzz=3",
            ("checkpoint.zzz", "asynchronous, init_from, interval, keep or new_connector"),
        ),
        (
            "stage.learning_rates.visoin=1.0",
            ("stage.learning_rates.visoin", "did you mean vision"),
        ),
        (
            "language.rope_scaling={factr: 1.0, factor: 1.0}",
            ("language.rope_scaling.factr", "did you mean factor"),
        ),
        (
            "data.sources=[{records: a, images: b, image: c}]",
            ("data.sources.0.image", "did you mean images"),
        ),
        (
            "language.num_layers=four",
            ("language.num_layers", "'four'", "whole number above 0"),
        ),
        ("language.num_layers=0", ("language.num_layers", "0", "whole number above 0")),
        ("language.num_layers=4.0", ("language.num_layers", "4.0", "whole number above 0")),
        ("stage.moe=1", ("stage.moe", "1", "true or false")),
        ("moe.top_k=true", ("moe.top_k", "True", "whole number")),
        ("moe.layers=odd", ("moe.layers", "'odd'", "interleaved or all")),
        ("moe.layers=[1, x]", ("moe.layers.1", "'x'", "whole number")),
        ("moe.variant=moie", ("moe.variant", "'moie'", "dense, vanilla, modality or moiie")),
        (
            "moe.num_text_experts=-1",
            ("moe.num_text_experts", "-1", "from 0 to 256 or null"),
        ),
        ("optimizer.beta1=1.5", ("optimizer.beta1", "1.5", "0 to below 1")),
        ("optimizer.epsilon=.nan", ("optimizer.epsilon", "nan", "above 0")),
        ("optimizer.epsilon=.inf", ("optimizer.epsilon", "inf", "above 0")),
        ("stage.learning_rates.vision=0", ("stage.learning_rates.vision", "0", "above 0")),
        (
            "stage.learning_rates=2e-5",
            ("stage.learning_rates", "2e-05", "mapping"),
        ),
        ("output=3", ("output", "3", "text")),
        ("train=fast", ("train", "'fast'", "mapping", "global_batch_size")),
        ("vision.feature_layer=0", ("vision.feature_layer", "0", "not above -1")),
        (
            "language.preset=llama9",
            ("language.preset", "'llama9'", "llama3-8b", "tiny-llama or tiny-phi3"),
        ),
        (
            "language.family=gemma",
            ("language.family", "'gemma'", "llama, phi3, mixtral, mistral, qwen2 or qwen3"),
        ),
        ("vision.family=eva", ("vision.family", "'eva'", "siglip or clip")),
        ("vision.family=3", ("vision.family", "3", "siglip or clip")),
        ("vision.preset=llama3-8b", ("vision.preset", "'llama3-8b'", "clip-l-336")),
        ("language.preset=../schema", ("language.preset", "'../schema'", "llama3-8b")),
        ("language.preset=[a]", ("language.preset", "['a']", "llama3-8b")),
        ("data.preset=small", ("data.preset", "'small'", "no presets")),
        ("train.steps", ("'train.steps'", "section.key=value")),
        ("=3", ("'=3'", "section.key=value")),
        ("train..steps=3", ("'train..steps=3'", "section.key=value")),
        ("train.steps=[1", ("train.steps=[1", "YAML")),
        (
            "output.name=x",
            ("output", "'runs/test'", "name", "as a whole"),
        ),
        ("data.sources.0.images=x", ("data.sources", "'records'")),
        (
            "data.tokenizer=${NOWHERE}/t",
            ("data.tokenizer", "'${NOWHERE}/t'", "variable NOWHERE"),
        ),
        (
            "data.sources=[{records: a, images: '${NOWHERE}'}]",
            ("data.sources.0.images", "'${NOWHERE}'", "variable NOWHERE"),
        ),
    ],
)
def test_bad_override(tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    _refuses(tmp_path, [override], *parts)


def test_unknown_key_comes_before_the_key_it_should_have_been(tmp_path: Path) -> None:
    text = MINIMAL.replace("global_batch_size", "global_batch")
    _refuses(tmp_path, [], "train.global_batch ", "global_batch_size", "2 problems", text=text)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("output: runs/test\n", ("output", "missing", "text")),
        (
            "train: {global_batch_size: 4, steps: 3}\n",
            ("train", "missing", "mapping", "global_batch_size"),
        ),
        ("  tokenizer: tokenizer\n", ("data.tokenizer", "missing", "text")),
        ("  sequence_length: 64\n", ("data.sequence_length", "missing", "whole number")),
    ],
)
def test_missing_key(tmp_path: Path, line: str, parts: tuple[str, ...]) -> None:
    assert line in MINIMAL
    _refuses(tmp_path, [], *parts, text=MINIMAL.replace(line, ""))


def test_several_problems_are_counted(tmp_path: Path) -> None:
    overrides = ["output=3", "moe.layers=odd", "moe.top_k=x"]
    _refuses(tmp_path, overrides, "output", "3", "text", "3 problems")


def test_combinations_are_checked_on_load(tmp_path: Path) -> None:
    _refuses(tmp_path, ["train.epochs=1"], "train.steps", "train.epochs", "exactly one")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("output: x\nlanguage: [1,\ntrain: {", ("run.yaml", "line 3", "YAML")),
        ("output: x\n\toutput: y", ("run.yaml", "line 2", "YAML")),
        ("output: x\nstage:\n  moe: true\n  moe: false\n", ("run.yaml", "line 4", "'moe'")),
        ("output: \x00", ("run.yaml", "YAML")),
        ("output: 2024-99-99", ("run.yaml", "YAML")),
        ("", ("run.yaml", "None", "mapping", "output, language")),
        ("- a\n- b\n", ("run.yaml", "['a', 'b']", "mapping", "output, language")),
    ],
)
def test_broken_file(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    _refuses(tmp_path, [], *parts, text=text)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xff")
    for path, reason in (
        (tmp_path / "absent.yaml", "does not exist"),
        (tmp_path, "Is a directory"),
        (binary, "UTF-8"),
    ):
        with user_error(path, reason):
            load_config(path)
