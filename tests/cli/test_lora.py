"""The LoRA example: what it trains, what it leaves alone, and the way back to a checkpoint."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.import_hf import import_checkpoint
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.data.records.llava import RecordFile
from tests.helpers.launch import ROOT
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import user_error

STEPS = 5


@pytest.fixture(scope="module")
def lora() -> Iterator[ModuleType]:
    """The program, in this process: what it imports takes seconds."""
    spec = importlib.util.spec_from_file_location("lora_example", ROOT / "examples" / "lora.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def call(lora: ModuleType, *arguments: object) -> None:
    before = sys.argv
    sys.argv = ["lora.py", *map(str, arguments)]
    try:
        lora.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module", params=["phi3", "llama"])
def export(
    request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny export in fp32, no two experts of which are alike."""
    folder = tmp_path_factory.mktemp(request.param)
    llm = write_language(
        folder / "llm", request.param, torch.float32, vocab_size=512, max_position_embeddings=256
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llm / name).unlink()
    shutil.copy(digits / "data" / "tokenizer.model", llm)
    vision = write_vision(folder / "vision", dtype=torch.float32)
    checkpoint = upcycle_checkpoint(llm, vision, folder / "ckpt", UpcycleOptions(perturb=0.1))
    return export_checkpoint(checkpoint, folder / "export")


@pytest.fixture
def data(digits: Path) -> list[object]:
    folder = digits / "data"
    return ["--records", folder / "train.jsonl", "--images", folder / "images"]


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()


def inputs_of(folder: Path, digits: Path, number: int) -> tuple[dict[str, Tensor], Any]:
    """What the export's processor makes of a record of the training set, and the record."""
    record = RecordFile(digits / "data" / "train.jsonl")[number]
    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
    text = processor.apply_chat_template(messages)
    images = [Image.open(digits / "data" / "images" / path) for path in record.images]
    return dict(processor(text=text, images=images or None, return_tensors="pt")), record


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


def test_train_merge_import(
    lora: ModuleType, export: Path, data: list[object], digits: Path, tmp_path: Path
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    call(
        *(lora, export, *data, "--out", adapter, "--merge", merged, "--steps", STEPS),
        *("--batch-size", 4, "--accumulate", 2, "--learning-rate", 0.01, "--rank", 2),
        *("--log-steps", 1, "--save-steps", STEPS),
    )
    state = json.loads((adapter / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1

    # The adapter alone, over the weights that it was trained on.
    with_adapter = lora.adapted(lora.argparse.Namespace(export=export, out=adapter))
    base, after = load(export), load(merged)
    for number in range(3):
        inputs, _ = inputs_of(export, digits, number)
        expected = logits(with_adapter, inputs)
        assert (logits(after, inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (logits(base, inputs) - expected).abs().max() > 1e-3 * expected.abs().max()

    # Every target has moved in every layer and expert, nothing else has.  In a chat no answer
    # depends on what the vision expert of the last layer writes at image positions.
    old, new = (load_file(folder / "model.safetensors") for folder in (export, merged))
    moved = {name for name in old if not old[name].equal(new[name])}
    target = r"language_model\.layers\.\d+\.(self_attn|mlp\.experts\.\d+)\.\w+_proj\.weight"
    targets = {name for name in old if re.search(target, name)}
    assert set(old) == set(new)
    assert moved <= targets and len(moved) >= 4 * 2 + 7 * 3
    assert all("layers.3.mlp.experts.0." in name for name in targets - moved)

    # Everything but the weights is the export's own, and a checkpoint gives the same weights back.
    kept = {file.name for file in export.iterdir()} - {"model.safetensors"}
    assert kept | {"model.safetensors"} == {file.name for file in merged.iterdir()}
    assert all((export / name).read_bytes() == (merged / name).read_bytes() for name in kept)
    again = export_checkpoint(
        import_checkpoint(merged, tmp_path / "checkpoint").folder, tmp_path / "again"
    )
    back = load_file(again / "model.safetensors")
    assert set(back) == set(new) and all(back[name].equal(new[name]) for name in new)


def test_samples_are_those_of_the_processor(
    lora: ModuleType, export: Path, data: list[object], digits: Path
) -> None:
    """Same ids, types and pixels as in a chat, and labels on answers alone."""
    records, images = data[1], data[3]
    options = lora.argparse.Namespace(
        export=export, records=str(records), images=str(images), max_length=160
    )
    samples = lora.Samples(options)
    for number in range(8):
        inputs, record = inputs_of(export, digits, number)
        sample = samples[number]
        for name in ("input_ids", "mm_token_type_ids"):
            assert sample[name].equal(inputs[name][0]), name
        if record.images:
            assert torch.allclose(sample["pixel_values"], inputs["pixel_values"], atol=1e-6)
        tokenizer = samples.data.encoding.tokenizer
        learned = [int(i) for i in sample["labels"] if i != -100]
        template = samples.data.encoding.template
        text = "".join(s.text for s in template.render(record.turns) if s.train)
        assert tokenizer.decode(learned).split() == text.split() != []
        at = (sample["labels"] != -100).nonzero().flatten()
        assert sample["labels"][at].equal(sample["input_ids"][at])
    batch = lora.collate([samples[i] for i in range(4)])
    assert batch["attention_mask"].sum() == sum(len(samples[i]["input_ids"]) for i in range(4))
    assert batch["labels"].shape == batch["input_ids"].shape == batch["mm_token_type_ids"].shape


def test_records_without_their_pictures(
    lora: ModuleType, export: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (digits / "data" / "train.jsonl").read_text().splitlines()
    lines = [line for line in lines if isinstance(json.loads(line).get("image"), str)][:3]
    broken = json.loads(lines[1]) | {"image": "gone.png"}
    (tmp_path / "records.jsonl").write_text("\n".join([lines[0], json.dumps(broken), lines[2]]))
    options = lora.argparse.Namespace(
        export=export,
        records=str(tmp_path / "records.jsonl"),
        images=str(digits / "data" / "images"),
        max_length=160,
    )
    samples = lora.Samples(options)
    assert samples[1]["input_ids"].equal(samples[2]["input_ids"])
    assert capsys.readouterr().err.count("gone.png") == 1
    (tmp_path / "records.jsonl").write_text(json.dumps(broken))
    with user_error("--images", "gone.png"):
        lora.Samples(options)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ("nothing to do", "--records")),
        (["--records", "x.json"], ("--records", "--images")),
        (["--records", "x.json", "--images", ".", "--rank", "0"], ("--rank", "0")),
        (["--merge", "new"], ("--out", "adapter")),
        (["--merge", ROOT], (ROOT, "exists", "--force")),
    ],
)
def test_refusals(
    words: list[object], parts: tuple[object, ...], lora: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "processor_config.json").write_text("{}")
    with user_error(*parts):
        call(lora, tmp_path, *words, "--out", tmp_path / "adapter")
    (tmp_path / "processor_config.json").unlink()
    with user_error(tmp_path, "export"):
        call(lora, tmp_path, *words, "--out", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
