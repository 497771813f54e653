"""The SmolLM2 example from end to end, with a tiny random Llama in place of the download."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import ROOT, python
from tests.helpers.tiny_hf import write_language
from tests.unit.hf.tiny import tokenizer_directory

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    """A Llama whose tokenizer knows every byte and whose chat template is like SmolLM2's."""
    folder = write_language(
        tmp_path / "llm",
        dtype=torch.float32,
        vocab_size=258,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    tokenizer_directory(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_train_smollm2(llm: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    variables = {
        "PYTHON": python(),
        "LLM": str(llm),
        "OUTPUT": str(output),
        "STEPS": "3",
        "OMP_NUM_THREADS": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    unset = {"VISION", "NPROC", "QUESTION", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH"}
    result = subprocess.run(
        # A token per byte makes long conversations.
        ["bash", str(ROOT / "examples/train_smollm2.sh"), "data.sequence_length=1024"],
        env={k: v for k, v in os.environ.items() if k not in unset} | variables,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, (result.stdout[-2000:], result.stderr[-4000:])
    metrics = [json.loads(x) for x in (output / "stage2/metrics.jsonl").read_text().splitlines()]
    losses = [line["lm_loss"] for line in metrics]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert f"loss {losses[0]:.3f} in the first step, {losses[2]:.3f} in the last" in result.stdout
    assert "2 process(es) on cpu" in result.stdout and (output / "losses.png").is_file()
    config = json.loads((output / "export/config.json").read_text())
    assert config["experts"] == {"vision": 1, "shared": 2, "text": 1}
    assert config["moe_layers"] == [1, 3] and config["image_token_id"] == 258
    assert result.stdout.count("\nWhat is the capital of France?\n") == 2
    assert "SAME: tensors equal" in result.stdout
    dense, upcycled = re.findall(r"^([0-9.]+) on \d+ tokens: ", result.stdout, re.MULTILINE)
    assert abs(float(dense) - float(upcycled)) <= 1e-3
