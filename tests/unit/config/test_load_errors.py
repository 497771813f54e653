"""Every mistake in a configuration is one sentence with the key, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.config.load import load_config
from moiie_megatron.utils.errors import UserError
from tests.unit.config.minimal import MINIMAL, load_minimal


def _message(tmp_path: Path, overrides: list[str], text: str = MINIMAL) -> str:
    with pytest.raises(ValueError) as caught:
        load_minimal(tmp_path, overrides, text=text)
    # pydantic's own error is a ValueError too: only our plain one will do.
    assert type(caught.value) is UserError
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "language.hiden_size=3",
            "language.hiden_size is not a known key: did you mean hidden_size?",
        ),
        ("trian.steps=3", "trian is not a known key: did you mean train?"),
        (
            "checkpoint.zzz=3",
            "checkpoint.zzz is not a known key: use asynchronous, init_from, interval, keep or "
            "new_connector.",
        ),
        (
            "stage.learning_rates.visoin=1.0",
            "stage.learning_rates.visoin is not a known key: did you mean vision?",
        ),
        (
            "language.rope_scaling={factr: 1.0, factor: 1.0}",
            "language.rope_scaling.factr is not a known key: did you mean factor?",
        ),
        (
            "data.sources=[{records: a, images: b, image: c}]",
            "data.sources.0.image is not a known key: did you mean images?",
        ),
        (
            "language.num_layers=four",
            "language.num_layers is 'four': use a whole number above 0.",
        ),
        ("language.num_layers=0", "language.num_layers is 0: use a whole number above 0."),
        ("language.num_layers=4.0", "language.num_layers is 4.0: use a whole number above 0."),
        ("stage.moe=1", "stage.moe is 1: use true or false."),
        ("moe.top_k=true", "moe.top_k is True: use a whole number above 0."),
        ("moe.layers=odd", "moe.layers is 'odd': use interleaved or all or a list (a whole"),
        ("moe.layers=[1, x]", "moe.layers.1 is 'x': use a whole number."),
        ("moe.variant=moie", "moe.variant is 'moie': use dense, vanilla, modality or moiie."),
        (
            "moe.num_text_experts=-1",
            "moe.num_text_experts is -1: use a whole number not below 0 or null.",
        ),
        ("optimizer.beta1=1.5", "optimizer.beta1 is 1.5: use a number from 0 to 1."),
        ("optimizer.epsilon=.nan", "optimizer.epsilon is nan: use a number above 0."),
        ("optimizer.epsilon=.inf", "optimizer.epsilon is inf: use a number above 0."),
        ("stage.learning_rates.vision=0", "stage.learning_rates.vision is 0: use a number above 0"),
        (
            "stage.learning_rates=2e-5",
            "stage.learning_rates is 2e-05: use a mapping with keys from",
        ),
        ("output=3", "output is 3: use text."),
        ("train=fast", "train is 'fast': use a mapping with the keys global_batch_size,"),
        ("vision.feature_layer=0", "vision.feature_layer is 0: use a whole number not above -1."),
        (
            "language.preset=llama9",
            "language.preset is 'llama9': use llama3-8b, mistral-7b, phi3-mini, qwen2.5-7b, "
            "qwen3-8b, tiny-llama or tiny-phi3.",
        ),
        (
            "language.family=gemma",
            "language.family is 'gemma': use llama, phi3, mixtral, mistral, qwen2 or qwen3.",
        ),
        ("vision.family=eva", "vision.family is 'eva': use siglip or clip."),
        ("vision.family=3", "vision.family is 3: use siglip or clip."),
        ("vision.preset=llama3-8b", "vision.preset is 'llama3-8b': use clip-l-336, siglip-"),
        ("language.preset=../schema", "language.preset is '../schema': use llama3-8b,"),
        ("language.preset=[a]", "language.preset is ['a']: use llama3-8b,"),
        ("data.preset=small", "data.preset is 'small', but data has no presets."),
        ("train.steps", "The override 'train.steps' is not of the form section.key=value."),
        ("=3", "The override '=3' is not of the form section.key=value."),
        ("train..steps=3", "The override 'train..steps=3' is not of the form section.key=value."),
        ("train.steps=[1", "The override train.steps=[1, line 1 is not valid YAML: "),
        (
            "output.name=x",
            "output is 'runs/test', which has no key name: override output as a whole.",
        ),
        ("data.sources.0.images=x", "data.sources is [{'records'"),
        (
            "data.tokenizer=${NOWHERE}/t",
            "data.tokenizer is '${NOWHERE}/t', but the environment variable NOWHERE is not set",
        ),
        (
            "data.sources=[{records: a, images: '${NOWHERE}'}]",
            "data.sources.0.images is '${NOWHERE}', but the environment variable NOWHERE",
        ),
    ],
)
def test_bad_override(tmp_path: Path, override: str, message: str) -> None:
    assert _message(tmp_path, [override]).startswith(message)


def test_unknown_key_comes_before_the_key_it_should_have_been(tmp_path: Path) -> None:
    text = MINIMAL.replace("global_batch_size", "global_batch")
    assert _message(tmp_path, [], text) == (
        "train.global_batch is not a known key: did you mean global_batch_size "
        "(the first of 2 problems)?"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("output: runs/test\n", "output is missing: give text."),
        (
            "train: {global_batch_size: 4, steps: 3}\n",
            "train is missing: give a mapping with the keys global_batch_size, micro_batch_size,",
        ),
        ("  tokenizer: tokenizer\n", "data.tokenizer is missing: give text."),
        ("  sequence_length: 64\n", "data.sequence_length is missing: give a whole number above 0"),
    ],
)
def test_missing_key(tmp_path: Path, line: str, message: str) -> None:
    assert line in MINIMAL
    assert _message(tmp_path, [], MINIMAL.replace(line, "")).startswith(message)


def test_several_problems_are_counted(tmp_path: Path) -> None:
    overrides = ["output=3", "moe.layers=odd", "moe.top_k=x"]
    assert _message(tmp_path, overrides) == "output is 3: use text (the first of 3 problems)."


def test_combinations_are_checked_on_load(tmp_path: Path) -> None:
    assert "give exactly one of the two" in _message(tmp_path, ["train.epochs=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\nlanguage: [1,\ntrain: {", "run.yaml, line 3 is not valid YAML: "),
        ("output: x\n\toutput: y", "run.yaml, line 2 is not valid YAML: "),
        (
            "output: x\nstage:\n  moe: true\n  moe: false\n",
            "line 4 is not valid YAML: the key 'moe'",
        ),
        ("output: \x00", "run.yaml is not valid YAML: "),
        ("output: 2024-99-99", "run.yaml is not valid YAML: "),
        ("", "run.yaml holds None: use a mapping with the keys output, language,"),
        ("- a\n- b\n", "run.yaml holds ['a', 'b']: use a mapping with the keys output,"),
    ],
)
def test_broken_file(tmp_path: Path, text: str, message: str) -> None:
    assert message in _message(tmp_path, [], text)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xff")
    for path, reason in (
        (tmp_path / "absent.yaml", "does not exist: name a YAML file."),
        (tmp_path, "cannot be read: Is a directory."),
        (binary, "cannot be read: it is not UTF-8 text."),
    ):
        with pytest.raises(ValueError) as caught:
            load_config(path)
        assert str(caught.value) == f"The configuration {path} {reason}"
