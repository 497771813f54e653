"""The chat format of a checkpoint and of its export, for templates as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, GenerationConfig

from moiie_megatron.config.load import dump_config, load_saved_config
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.extract import extract_expert
from moiie_megatron.convert.hf import export_files
from moiie_megatron.convert.import_hf import import_checkpoint
from moiie_megatron.convert.upcycle import upcycle_checkpoint
from moiie_megatron.data.encode.encoder import encode_prompt
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.data.records.record import Turn
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.tiny_tokenizer import CHATML, LLAMA3, PHI3, write_byte_tokenizer
from tests.helpers.user_errors import user_error
from tests.unit.data.encode import chat_templates

TURNS = [Turn("user", "<image>\nhi"), Turn("assistant", "yes"), Turn("user", "why?")]


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision(tmp_path_factory.mktemp("vision"))


def language(
    folder: Path, markers: tuple[str, ...], template: str | None, eos: str, bos: str | None = None
) -> Path:
    write_language(folder, vocab_size=272, num_hidden_layers=2)
    return write_byte_tokenizer(folder, markers, template, eos, bos)


def llama3(folder: Path, template: str | None) -> Path:
    return language(folder, LLAMA3, template, LLAMA3[1], LLAMA3[0])


def phi3(folder: Path, template: str | None) -> Path:
    return language(folder, PHI3, template, PHI3[1], PHI3[0])


def template_of(checkpoint: Path) -> str:
    return load_saved_config(checkpoint / "run.yaml").stage.template


@pytest.mark.parametrize(
    ("make", "template", "chosen", "reason"),
    [
        (phi3, chat_templates.PHI3, "phi3", "changes earlier text"),
        (llama3, chat_templates.LLAMA3_FIRST, "llama3", "changes earlier text"),
        (llama3, "{{ messages[0].image.size }}", "llama3", "refuses"),
        (llama3, "{{ bos_token }}Hello.", "llama3", "does not write the text"),
        (llama3, chat_templates.LLAMA3, "tokenizer", None),
        (llama3, chat_templates.PARTS, "tokenizer", None),
        (llama3, None, "plain", None),
    ],
)
def test_the_template_is_tried(
    make: Any, template: str, chosen: str, reason: str | None, vision: Path, tmp_path: Path
) -> None:
    """A built-in format stands in for one that does not serve; import and export keep it."""
    notes: list[str] = []
    llm = make(tmp_path / "llm", template)
    first = upcycle_checkpoint(llm, vision, tmp_path / "first", note=notes.append)
    assert template_of(first) == chosen
    if reason is None:
        assert notes == []
    else:
        (note,) = notes
        assert reason in note and f"stage.template is {chosen}" in note
    notes = []
    out = export_checkpoint(first, tmp_path / "out", note=notes.append)
    assert ["no questions" in note for note in notes] == ([True] if chosen == "plain" else [])
    assert import_checkpoint(out, tmp_path / "second").notes == ()
    assert template_of(tmp_path / "second") == chosen


@pytest.mark.parametrize(
    "template", [chat_templates.PHI3, chat_templates.LLAMA3_FIRST, "{{ x.y.z }}"]
)
def test_refused_before_anything_is_written(template: str, vision: Path, tmp_path: Path) -> None:
    llm = language(tmp_path / "llm", CHATML, template, CHATML[2])
    with user_error("chat template", "no built-in format", "chat_template.jinja"):
        upcycle_checkpoint(llm, vision, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "template", "end"),
    [
        (llama3, chat_templates.LLAMA3, "<|eot_id|>"),
        (llama3, chat_templates.LLAMA3_FIRST, "<|eot_id|>"),
        (phi3, chat_templates.PHI3, "<|end|>"),
    ],
)
def test_an_export_stops_and_prompts_as_trained(
    make: Any, template: str, end: str, vision: Path, tmp_path: Path
) -> None:
    checkpoint = upcycle_checkpoint(
        make(tmp_path / "llm", template), vision, tmp_path / "checkpoint"
    )
    tokenizer = load_tokenizer(checkpoint)
    # 2 is what generation_config.json of the language model says.
    stops = [tokenizer.eos_id, 2, tokenizer.token_id(end)]
    out = export_checkpoint(checkpoint, tmp_path / "out")
    one = extract_expert(checkpoint, ["text.0"], tmp_path / "one")
    for folder in (out, one):
        for name in ("config.json", "generation_config.json"):
            assert json.loads((folder / name).read_text())["eos_token_id"] == stops
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    want, _ = encode_prompt(
        TURNS,
        tokenizer,
        load_template(template_of(checkpoint), tokenizer),
        processor.num_image_tokens,
    )
    messages = [{"role": turn.role, "content": turn.text} for turn in TURNS]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    inputs = processor(text=text, images=[image], add_special_tokens=False)
    assert inputs["input_ids"][0] == want.tolist()


def test_ends_in_config_json_alone(vision: Path, tmp_path: Path) -> None:
    """As transformers does for a model without a generation_config.json."""
    llm = llama3(tmp_path / "llm", chat_templates.LLAMA3)
    (llm / "generation_config.json").unlink()
    file = llm / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [257, 33]}))
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint")
    out = export_checkpoint(checkpoint, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [257, 33, 260]


@pytest.mark.parametrize(("markers", "chosen"), [(PHI3, "phi3"), (CHATML, "plain")])
def test_an_earlier_checkpoint_with_an_unusable_template(
    markers: tuple[str, ...], chosen: str, vision: Path, tmp_path: Path
) -> None:
    """It says ``tokenizer``, which cannot have been trained: the export says what it has."""
    llm = language(tmp_path / "llm", markers, None, "<|endoftext|>")
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(chat_templates.PHI3)
    config = load_saved_config(checkpoint / "run.yaml", ["stage.template=tokenizer"])
    (checkpoint / "run.yaml").write_text(dump_config(config))
    notes: list[str] = []
    out = export_checkpoint(checkpoint, tmp_path / "out", note=notes.append)
    assert f"The chat template of the export is {chosen}" in notes[0]
    assert f"stage.template: {chosen}" in (out / "chat_template.jinja").read_text()


def test_other_prompts_are_said(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = llama3(tmp_path / "llm", chat_templates.LLAMA3)
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint")

    def another(*arguments: Any, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, types = encode_prompt(*arguments, **keywords)
        return ids.index_fill(0, torch.tensor([3]), 7), types

    monkeypatch.setattr(export_files, "encode_prompt", another)
    notes: list[str] = []
    export_checkpoint(checkpoint, tmp_path / "out", note=notes.append)
    assert len(notes) == 1 and "other ids than training does (position 3: " in notes[0]


GENERATION = [
    (
        '{"temperature": 0.6, "top_p": 0.9, "max_length": 99}',
        {"max_length": 99},
        ["temperature", "top_p"],
    ),
    ('{"top_p": 0.9, "do_sample": true}', {"do_sample": True, "top_p": 0.9}, []),
    (
        '{"eos_token_id": [260, 258, 4000], "pad_token_id": 999}',
        {"pad_token_id": 257},
        ["pad_token_id", "eos_token_id"],
    ),
    ('{"eos_token_id": "2", "bos_token_id": 3}', {"bos_token_id": 3}, ["eos_token_id"]),
    (
        '{"suppress_tokens": [1, 5000], "cache_implementation": "none such"}',
        {},
        ["suppress", "cache"],
    ),
    (
        '{"num_return_sequences": 3, "num_beams": 4}',
        {"num_return_sequences": 3, "num_beams": 4},
        [],
    ),
    ('{"early_stopping": true, "top_k": null}', {}, ["early_stopping"]),
    ('{"top_p": 0.', {}, ["cannot be read"]),
    ("[1, 2]", {}, ["no JSON object"]),
]


@pytest.mark.parametrize(("content", "kept", "said"), GENERATION)
def test_generation_config(
    content: str, kept: dict[str, Any], said: list[str], vision: Path, tmp_path: Path
) -> None:
    llm = llama3(tmp_path / "llm", chat_templates.LLAMA3)
    (llm / "generation_config.json").write_text(content)
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint")
    notes: list[str] = []
    out = export_checkpoint(checkpoint, tmp_path / "out", note=notes.append)
    assert len(notes) == len(said)
    assert all(any(word in note for note in notes) for word in said)
    stops = [257, *([258] if "258" in content else []), 260]
    values = json.loads((out / "generation_config.json").read_text())
    want = {"bos_token_id": 256, "pad_token_id": 257, "eos_token_id": stops}
    assert values == want | kept
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == stops
    loaded = GenerationConfig.from_pretrained(out)
    loaded.validate(strict=True)
    loaded.save_pretrained(tmp_path / "again")
