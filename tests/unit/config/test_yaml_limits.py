"""Numbers that YAML readers disagree on, and documents that are larger than they look."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.config import yaml_text
from moiie_megatron.config.load import load_config, load_saved_config
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import MINIMAL, load_minimal

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)
)
HOSTILE = [
    (BOMB, "aliases"),
    (MERGES, "aliases"),
    ("a: &a {b: *a}", "alias of itself"),
    ("a: &a [*a]", "alias of itself"),
    ("a: " + "[" * 100_000, "nested"),
    ("a: " + "{x: " * 5000, "nested"),
    ("a: " + "x" * (1 << 21), "characters"),
    ('output: "a\\0b"', "\\x00"),
    ("a: !!timestamp x", "timestamp"),
    ("a: 0x" + "f" * 5000, "too large"),
]


@pytest.mark.parametrize(("text", "part"), HOSTILE)
def test_hostile_documents(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "hostile.yaml"
    file.write_text(text)
    for load in (load_config, load_saved_config):
        with user_error(file, part):
            load(file)
    with user_error(file, part):
        load_minimal(tmp_path, [f"data.sources={file}"])


@pytest.mark.parametrize("text", ["010", "-017", "00", "1:30", "1:30.5", "190:20:30"])
def test_numbers_that_readers_disagree_on(tmp_path: Path, text: str) -> None:
    with user_error("train.steps", repr(text), "quotes"):
        load_minimal(tmp_path, [f"train.steps={text}"])
    assert load_minimal(tmp_path, [f"output='{text}'"]).output == text
    value = {"a": text}
    assert yaml_text.parse(yaml_text.write(value), "written") == value


@pytest.mark.parametrize(("text", "value"), [("0x10", 16), ("1_0", 10), ("10", 10)])
def test_numbers_with_one_meaning(tmp_path: Path, text: str, value: int) -> None:
    assert load_minimal(tmp_path, [f"train.steps={text}"]).train.steps == value


def test_an_alias_may_be_used(tmp_path: Path) -> None:
    text = "x: &a {records: r, images: i}\n".replace("x: ", "").strip()
    sources = f"sources: [{text}, *a]"
    config = load_minimal(
        tmp_path,
        text=MINIMAL.replace("sources: [{records: records.json, images: images}]", sources),
    )
    assert config.data.sources[0] == config.data.sources[1]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("moe.top_k=1", ("moe.top_k is 1", "2 or more")),
        ("train.seed=18446744073709551616", ("train.seed", "at most 9223372036854775807")),
        ("train.seed=-1", ("train.seed", "not below 0")),
        ("optimizer.beta1=1.0", ("optimizer.beta1", "to below 1")),
        ("optimizer.beta2=1", ("optimizer.beta2", "to below 1")),
        ("optimizer.epsilon=1e-300", ("optimizer.epsilon", "at least 1e-30")),
        ("stage.learning_rates.moe=1e300", ("stage.learning_rates.moe", "at most 1e+30")),
        ("stage.learning_rates.visoin=null", ("visoin", "did you mean vision")),
        ("train.timeout_minutes=999999999", ("train.timeout_minutes", "525600")),
        ("train.epochs=1e30", ("train.epochs", "1e+06")),
        ("language.num_layers=2147483647", ("language.num_layers", "10000")),
        ("moe.num_shared_experts=100000", ("moe.num_shared_experts", "256")),
        ("megatron.init_method_std=.inf", ("megatron.init_method_std", "inf")),
        ("megatron.recompute_granularity=full", ("recompute_method", "recompute_num_layers")),
        (
            "language.rope_scaling={factor: 8.0, low_freq_factor: 4.0}",
            ("low_freq_factor is 4.0", "high_freq_factor is 4.0"),
        ),
        ("output=10", ("output is 10", "in quotes")),
        ("output=''", ("output is ''", "not empty")),
        ("train.steps='10'", ("train.steps is '10'", "without quotes")),
    ],
)
def test_values_that_would_fail_later(
    tmp_path: Path, override: str, parts: tuple[str, ...]
) -> None:
    with user_error(*parts):
        load_minimal(tmp_path, [override])


def test_a_saved_run_that_no_export_can_express(tmp_path: Path) -> None:
    """Exports read a checkpoint's configuration so."""
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + "megatron: {softmax_type: learnable}\n")
    with user_error("megatron.softmax_type", "cannot express"):
        load_saved_config(file)
