"""An export answers what its checkpoint answers: same prompts, same ids, same end."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from moiie_megatron.checkpoint.directory import find_checkpoint
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.data.records.record import Turn
from moiie_megatron.evaluation.ask import ask
from moiie_megatron.evaluation.ask_export import ask_export
from moiie_megatron.evaluation.questions import read_questions
from moiie_megatron.exported.model import ExportedModel
from moiie_megatron.exported.routing import RoutingRecorder
from moiie_megatron.generation.generator import Generator
from tests.helpers.launch import ROOT

QUESTION = "Which digit is at the top left?"


@pytest.fixture(scope="module")
def stopping(generator: Generator, digits: Path) -> list[int]:
    """The answer's ids; the model is changed so that the end of a turn comes after them."""
    prompt = generator.prompt(
        [Turn("user", f"<image>\n{QUESTION}")],
        [generator.image_loader(digits / "images").load("test/00000.png")],
    )
    end = generator.tokenizer.token_id("<|end|>")
    assert end is not None
    weight = generator.model.language_model.output_layer.weight
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(8))
        # Never the most likely ones: the ends, and rows that pad the vocabulary.
        weight[generator.tokenizer.eos_id] = weight[end] = 0.0
        weight[generator.tokenizer.vocab_size :] = 0.0
    (free,) = generator.generate([prompt], 12)
    stop = 4
    assert len(set(free[: stop + 1])) == stop + 1
    with torch.no_grad():
        weight[end] = weight[free[stop]]
        weight[free[stop]] = 0.0
    (answer,) = generator.generate([prompt], 12)
    assert answer == free[:stop]
    return answer


@pytest.fixture(scope="module")
def export(
    run: Path, generator: Generator, stopping: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("hf") / "export"
    notes: list[str] = []
    export_checkpoint(find_checkpoint(run), out, note=notes.append)
    assert notes == []
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(generator.model.language_model.output_layer.weight)
    generation = json.loads((out / "generation_config.json").read_text())
    model.save_pretrained(out)
    (out / "generation_config.json").write_text(json.dumps(generation))
    return out


def messages(picture: Any, as_parts: bool) -> list[dict[str, Any]]:
    if as_parts:
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
        return [{"role": "user", "content": parts}]
    return [{"role": "user", "content": f"<image>\n{QUESTION}"}]


def test_the_end_of_a_turn_is_an_end_of_text(export: Path, generator: Generator) -> None:
    end, eos = generator.tokenizer.token_id("<|end|>"), generator.tokenizer.eos_id
    for name in ("config.json", "generation_config.json"):
        assert json.loads((export / name).read_text())["eos_token_id"] == [eos, end]


@pytest.mark.parametrize("as_parts", [False, True])
def test_the_usual_calls(
    as_parts: bool, export: Path, generator: Generator, stopping: list[int], digits: Path
) -> None:
    file = digits / "images" / "test" / "00000.png"
    processor: Any = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model: Any = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True)
    chat = messages(Image.open(file), as_parts)
    images = {} if as_parts else {"images": [Image.open(file)]}
    inputs = processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=images,
    )
    pixels = generator.image_loader(file.parent).load(file.name)
    prompt = generator.prompt([Turn("user", f"<image>\n{QUESTION}")], [pixels])
    assert inputs["input_ids"][0].tolist() == prompt.tokens.tolist()
    # In two steps, as the documentation of many models does it.
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    same = processor(text=text, images=[Image.open(file)], return_tensors="pt")
    assert torch.equal(same["input_ids"], inputs["input_ids"])
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert new[0, inputs["input_ids"].shape[1] : -1].tolist() == stopping


def test_the_pipeline(
    export: Path, generator: Generator, stopping: list[int], digits: Path
) -> None:
    ask = pipeline("image-text-to-text", model=str(export), trust_remote_code=True)
    chat = messages(None, as_parts=True)
    chat[0]["content"][0] = {"type": "image", "path": str(digits / "images/test/00000.png")}
    (result,) = ask(text=chat, max_new_tokens=12, return_full_text=False)
    want = generator.tokenizer.decode(stopping, skip_special_tokens=True)
    assert result["generated_text"].strip() == want.strip()


@pytest.mark.parametrize("question", [QUESTION, f"{QUESTION} <image>"])
def test_ask(question: str, export: Path, generator: Generator, digits: Path) -> None:
    spec = importlib.util.spec_from_file_location("ask", ROOT / "examples" / "ask.py")
    assert spec and spec.loader
    ask = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ask)
    file = digits / "images" / "test" / "00001.png"
    pixels = generator.image_loader(file.parent).load(file.name)
    text = question if "<image>" in question else f"<image>\n{question}"
    (want,) = generator.answer([generator.prompt([Turn("user", text)], [pixels])], 12)
    assert ask.answer(export, question, [file], 12) == want


def test_questions_are_answered_alike(export: Path, generator: Generator, digits: Path) -> None:
    """The same outcomes, whether the checkpoint or its export is asked."""
    questions = read_questions(digits / "test.jsonl")[:6]
    questions[2] = replace(questions[2], images=("test/none.png",))
    model = ExportedModel.load(export, device="cpu")
    options = {"batch_size": 4, "max_new_tokens": 6}
    images = digits / "images"
    want = [o for batch in ask(generator, questions, images, **options) for o in batch]
    with_recorder = RoutingRecorder(model.model)
    batches = ask_export(model, questions, images, recorder=with_recorder, **options)
    got = [o for batch in batches for o in batch]
    assert len({o.answer for o in want}) > 2
    assert [replace(o, error=bool(o.error)) for o in got] == [
        replace(o, error=bool(o.error)) for o in want
    ]
    assert "test/none.png" in got[2].error
    assert with_recorder.records()[0]["samples"] == 5
