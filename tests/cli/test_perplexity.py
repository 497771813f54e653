"""The perplexity example as a program: agreement, disagreement, a wrong directory."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.launch import ROOT
from tests.helpers.tiny_hf import write_language
from tests.unit.hf.tiny import tokenizer_directory


def _model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    write_language(folder, dtype=torch.float32, vocab_size=258, max_position_embeddings=1024)
    tokenizer_directory(folder)
    return folder


def _run(*folders: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "argv", ["perplexity.py", *map(str, folders)])
    runpy.run_path(str(ROOT / "examples/perplexity.py"), run_name="__main__")


def test_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = _model(tmp_path / "one", seed=0)
    _run(one, one, patch=monkeypatch)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.endswith(f" tokens: {one}")
    model = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    other = _model(tmp_path / "other", seed=1)
    model.save_pretrained(other)
    with pytest.raises(SystemExit, match=r"0\.001"):
        _run(one, other, patch=monkeypatch)
    with pytest.raises(SystemExit, match=r"nowhere.*config.json"):
        _run(tmp_path / "nowhere", patch=monkeypatch)
