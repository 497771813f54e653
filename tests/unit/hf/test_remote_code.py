"""An exported directory in a process that cannot import this project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moiie_megatron.hf.auto_files import write_remote_code
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.unit.hf import tiny

SCRIPT = """
import sys
sys.modules["moiie_megatron"] = None  # importing it raises
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
)

torch.set_num_threads(1)
directory, pictures, output, again = sys.argv[1:]
try:
    AutoConfig.from_pretrained(directory, trust_remote_code=False)
    sys.exit("code ran without leave")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
trust = {"trust_remote_code": True}
assert AutoConfig.from_pretrained(directory, **trust).model_type == "moiie"
processor = AutoProcessor.from_pretrained(directory, **trust)
model, report = AutoModelForImageTextToText.from_pretrained(
    directory, output_loading_info=True, experts_implementation="grouped_mm", **trust
)
assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys")), report
assert AutoModel.from_pretrained(directory, **trust).language_model is not None
images = [Image.open(f"{pictures}/{i}.png") for i in range(2)]
prompts = ["<s>one <image> two <image>", "<s>none"]
inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
save_file(dict(inputs, logits=logits, ids=ids), output)
model.save_pretrained(again)
processor.save_pretrained(again)
"""


@pytest.fixture(scope="module")
def export(directory: Path, processor: MoiieProcessor) -> Path:
    """A model as an exporter writes it, and two pictures."""
    export = directory / "export"
    config = tiny.config(text_config={"tie_word_embeddings": True})
    tiny.model(config).save_pretrained(export)
    processor.save_pretrained(export)
    write_remote_code(export)
    for i in range(2):
        tiny.picture(i).save(directory / f"{i}.png")
    return export


@pytest.mark.slow
def test_loads_and_runs_alone(export: Path, directory: Path, processor: MoiieProcessor) -> None:
    output, again = directory / "output.safetensors", directory / "again"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(directory / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(path) for path in (export, directory, output, again)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    got = load_file(output)
    prompts, images = ["<s>one <image> two <image>", "<s>none"], [0, 1]
    inputs = processor(
        text=prompts, images=[tiny.picture(i) for i in images], padding=True, return_tensors="pt"
    )
    model = tiny.model(tiny.config(text_config={"tie_word_embeddings": True}))
    with torch.no_grad():
        logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    want = dict(inputs, logits=logits, ids=ids)
    assert set(got) == set(want)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    # What was loaded and saved by others is an export again.
    names = {path.name for path in export.iterdir()}
    assert names <= {path.name for path in again.iterdir()}
    weights, kept = load_file(export / "model.safetensors"), load_file(again / "model.safetensors")
    assert set(weights) == set(kept)
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
