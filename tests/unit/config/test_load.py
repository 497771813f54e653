from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.config.load import dump_config, load_config, preset_names
from moiie_megatron.config.schema import RunConfig
from tests.unit.config.minimal import MINIMAL, load_minimal

PRESETS = {
    "language": [
        "llama3-8b",
        "mistral-7b",
        "phi3-mini",
        "qwen2.5-7b",
        "qwen3-8b",
        "tiny-llama",
        "tiny-phi3",
    ],
    "vision": ["clip-l-336", "siglip-so400m-384", "tiny-clip", "tiny-siglip"],
    "stage": ["stage-connector", "stage-dense", "stage-joint", "stage-moe-only"],
}


def _value(config: RunConfig, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optimizer.epsilon=1e-3", "optimizer.epsilon", 1e-3),
        ("optimizer.epsilon=1E-3", "optimizer.epsilon", 1e-3),
        ("optimizer.epsilon=.5e-3", "optimizer.epsilon", 5e-4),
        ("optimizer.clip_grad=1e2", "optimizer.clip_grad", 100.0),
        ("optimizer.clip_grad=2", "optimizer.clip_grad", 2.0),
        ("output='1e-3'", "output", "1e-3"),
        ("output=a=b", "output", "a=b"),
        ("language.sliding_window=null", "language.sliding_window", None),
        ("language.sliding_window=", "language.sliding_window", None),
        ("moe.layers=[1, 3]", "moe.layers", [1, 3]),
        ("moe={variant: modality}", "moe.variant", "modality"),
        ("language.preset=tiny-phi3", "language.family", "phi3"),
        ("megatron.init_method_std=0.5", "megatron.init_method_std", 0.5),
        ("language.rope_scaling.factor=8.0", "language.rope_scaling.factor", 8.0),
        ("train.steps=7", "train.steps", 7),
    ],
)
def test_override(tmp_path: Path, override: str, key: str, expected: object) -> None:
    value = _value(load_minimal(tmp_path, [override]), key)
    assert value == expected
    assert type(value) is type(expected)


def test_exponent_without_dot_is_a_number_in_files_too(tmp_path: Path) -> None:
    text = MINIMAL + "optimizer: {epsilon: 1e-6}\n"
    assert load_minimal(tmp_path, text=text).optimizer.epsilon == 1e-6


def test_section_is_laid_over_its_preset(tmp_path: Path) -> None:
    config = load_minimal(
        tmp_path,
        ["stage.learning_rates.vision=1e-6", "stage.learning_rates.connector=null"],
        text=MINIMAL.replace("stage-joint", "stage-joint, image_mode: square"),
    )
    assert config.stage.learning_rates == {"vision": 1e-6, "language": 2e-5, "moe": 2e-5}
    assert config.stage.image_mode == "square"
    assert config.stage.name == "joint"


def test_later_override_wins_and_keeps_siblings(tmp_path: Path) -> None:
    config = load_minimal(tmp_path, ["train.steps=7", "train.seed=5", "train.steps=8"])
    assert (config.train.steps, config.train.seed, config.train.global_batch_size) == (8, 5, 4)


def test_alias_is_not_overridden_with_its_anchor(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        "[{records: records.json, images: images}]", "[&a {records: r, images: i}]"
    )
    text += "log: &x {interval: 7}\ncheckpoint: *x\n"
    config = load_minimal(tmp_path, ["log.interval=2"], text=text)
    assert (config.log.interval, config.checkpoint.interval) == (2, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${HOME_DIR}/runs", "/data/runs"),
        ("${HOME_DIR}/${NAME}", "/data/a b"),
        ("$${NAME}", "${NAME}"),
        ("$$${NAME}", "$${NAME}"),
        ("$NAME", "$NAME"),
        ("cost in $", "cost in $"),
    ],
)
def test_variables(tmp_path: Path, text: str, expected: str) -> None:
    environ = {"HOME_DIR": "/data", "NAME": "a b"}
    config = load_minimal(tmp_path, [f"output='{text}'"], environ=environ)
    assert config.output == expected


def test_process_environment_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOIIE_TEST_FOLDER", "/from/process")
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL.replace("runs/test", "${MOIIE_TEST_FOLDER}/x"))
    assert load_config(path).output == "/from/process/x"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["language.preset=llama3-8b", "vision.preset=clip-l-336", "data.sequence_length=4096"],
        ["language.preset=phi3-mini", "stage.preset=stage-connector"],
        ["output='$${VALUE}'", "stage.name='1e-3'"],
        ["output='$$${VALUE}'", "stage.name='null'", "data.image_token='yes'"],
        ["megatron={init_method_std: 1e-5, hidden_dropout: null}", "moe.layers=[0, 3]"],
        ["language.rope_scaling={factor: 8.0}"],
    ],
)
def test_dump_loads_back_equal(tmp_path: Path, overrides: list[str]) -> None:
    config = load_minimal(tmp_path, overrides)
    text = dump_config(config)
    assert "preset" not in text
    assert load_minimal(tmp_path, text=text) == config


@pytest.mark.parametrize(("section", "names"), PRESETS.items())
def test_preset_names(section: str, names: list[str]) -> None:
    assert preset_names(section) == names


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, names in PRESETS.items() for name in names]
)
def test_every_preset_loads(tmp_path: Path, section: str, name: str) -> None:
    overrides = [f"{section}.preset={name}"]
    if name == "clip-l-336" or name == "siglip-so400m-384":
        overrides += ["language.preset=llama3-8b", "data.sequence_length=4096"]
    assert load_minimal(tmp_path, overrides)


@pytest.mark.parametrize(
    ("name", "image_tokens"),
    [("siglip-so400m-384", 729), ("clip-l-336", 576), ("tiny-siglip", 16), ("tiny-clip", 16)],
)
def test_image_tokens_of_the_encoders(tmp_path: Path, name: str, image_tokens: int) -> None:
    config = load_minimal(
        tmp_path,
        [f"vision.preset={name}", "language.preset=llama3-8b", "data.sequence_length=4096"],
    )
    assert config.vision.num_image_tokens == image_tokens
