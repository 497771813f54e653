"""``convert.py import`` and ``convert.py extract`` as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import Finished, command, run
from tests.helpers.reference import write_reference
from tests.helpers.tiny_hf import write_vision
from tests.helpers.user_errors import assert_user_error

TIMEOUT = 100
# In a process that cannot import this project.
GENERATE = """
import sys
sys.modules["moiie_megatron"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
trust = {"trust_remote_code": True}
model, report = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], output_loading_info=True, **trust
)
assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys")), report
processor = AutoProcessor.from_pretrained(sys.argv[1], **trust)
inputs = processor(text="a a", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
print(model.config.moe_layers, ids.shape[1] - inputs["input_ids"].shape[1])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return write_reference(folder / "theirs", write_vision(folder / "encoder", dtype=torch.float32))


def _convert(*arguments: str | Path) -> Finished:
    return run(command("tools/convert.py", arguments), TIMEOUT)


@pytest.mark.slow
def test_import_then_extract(trained: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "dense"
    first = _convert("import", "--hf", trained, "--out", checkpoint).check()
    assert first.stdout.startswith(f"{checkpoint}: see conversion_report.json")
    assert "import it with --last-image-token-as-text" in first.stdout
    again = _convert(
        "import", "--hf", trained, "--out", checkpoint, "--last-image-token-as-text", "--force"
    ).check()
    assert "--last-image-token-as-text" not in again.stdout
    assert "last_image_token_as_text: true" in (checkpoint / "run.yaml").read_text()

    _convert("extract", "--ckpt", checkpoint, "--expert", "text.0", "--out", out).check()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", GENERATE, str(out)],
        cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split("\n")[0] == "[] 3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("import", "--hf", "{trained}", "--experts", "1,2"), ("--experts", "'1,2'", "1,2,1")),
        (("import", "--hf", "{nothing}"), ("nothing/config.json",)),
        (("extract", "--ckpt", "{nothing}", "--expert", "text.0"), ("nothing", "no checkpoint")),
    ],
    ids=["experts", "no directory", "no checkpoint"],
)
def test_errors_are_one_sentence(
    arguments: tuple[str, ...], parts: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    words = [a.format(trained=trained, nothing=tmp_path / "nothing") for a in arguments]
    result = _convert(*words, "--out", tmp_path / "out")
    assert_user_error(result, *parts)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_two_commands_explain_themselves() -> None:
    text = run(command("tools/convert.py", ["--help"]), TIMEOUT).check().stdout
    assert "import" in text and "extract" in text
