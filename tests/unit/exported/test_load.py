"""Directories that are no export, and machines that lack what is asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moiie_megatron import exported
from moiie_megatron.exported.model import ExportedModel
from tests.helpers.user_errors import user_error


def _copy(export: Path, to: Path) -> Path:
    return Path(shutil.copytree(export, to))


def test_dtypes(export: Path, model: ExportedModel) -> None:
    assert model.model.dtype == torch.float32 and not model.model.training
    assert ExportedModel.load(export, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    with user_error("int8", "bfloat16"):
        ExportedModel.load(export, dtype="int8")


@pytest.mark.parametrize("device", ["quantum", "cuda:77", "cpu:x"])
def test_unknown_devices(device: str, export: Path) -> None:
    with user_error(device, "auto"):
        ExportedModel.load(export, device=device)


def test_no_export(export: Path, tmp_path: Path) -> None:
    with user_error(tmp_path / "nothing", "tools/convert.py export"):
        ExportedModel.load(tmp_path / "nothing")
    with user_error(export / "config.json", "no directory"):
        ExportedModel.load(export / "config.json")
    with user_error(export.parent / "checkpoint", "tools/convert.py export"):
        ExportedModel.load(export.parent / "checkpoint")
    with user_error(export.parent / "llm", "llama", "moiie"):
        ExportedModel.load(export.parent / "llm")


def test_damaged_exports(export: Path, tmp_path: Path) -> None:
    one = _copy(export, tmp_path / "one")
    (one / "config.json").write_text("{")
    with user_error(one / "config.json"):
        ExportedModel.load(one)
    two = _copy(export, tmp_path / "two")
    (two / "model.safetensors").unlink()
    with user_error(two, "export it again"):
        ExportedModel.load(two)
    three = _copy(export, tmp_path / "three")
    (three / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:-9])
    with user_error(three, "export it again"):
        ExportedModel.load(three)
    four = _copy(export, tmp_path / "four")
    (four / "tokenizer.json").unlink()
    with user_error(four, "export it again"):
        ExportedModel.load(four)


def test_missing_tensors_are_not_made_up(export: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = _copy(export, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.3.mlp.gate.weight"))
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with user_error(copy, 1, name):
        ExportedModel.load(copy)


def test_a_transformers_that_the_export_refuses(export: Path, tmp_path: Path) -> None:
    copy = _copy(export, tmp_path / "copy")
    code = (copy / "version_moiie.py").read_text()
    assert 'OLDEST = Version("' in code
    old = code.split('OLDEST = Version("')[1].split('"')[0]
    code = code.replace(f'OLDEST = Version("{old}")', 'OLDEST = Version("99.1")')
    (copy / "version_moiie.py").write_text(code)
    with user_error("transformers", "too old", "99.1"):
        ExportedModel.load(copy)


def test_needs_nothing_of_training() -> None:
    """It runs in environments that have neither Megatron-Core nor pydantic."""
    folder = Path(exported.__file__).parent
    names = [f"moiie_megatron.exported.{file.stem}" for file in folder.glob("*.py")]
    assert "moiie_megatron.exported.model" in names
    program = (
        "import importlib, sys\n"
        "for name in ('megatron', 'pydantic', 'sklearn', 'matplotlib', 'gradio'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {sorted(names)}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
