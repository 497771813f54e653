"""Reading safetensors directories, whole and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moiie_megatron.convert.hf.safetensors_reader import SafetensorsSource
from tests.helpers.user_errors import user_error

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def _single(folder: Path) -> Path:
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def _sharded(folder: Path) -> Path:
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, folder / f"model-{name}.safetensors")
    index = {"weight_map": {name: f"model-{name}.safetensors" for name in TENSORS}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("write", [_single, _sharded])
def test_reads_every_tensor(write, tmp_path: Path) -> None:
    source = SafetensorsSource(write(tmp_path))
    assert sorted(source.names) == ["a", "b"] and "a" in source and "c" not in source
    assert all(torch.equal(source.get(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("write", [_single, _sharded])
def test_parts_of_a_tensor_in_its_place(write, tmp_path: Path) -> None:
    source = SafetensorsSource(write(tmp_path))
    assert source.shape("a") == (2, 3)
    source.replace("a", {"row": (1,), "corner": (0, slice(1, 3))})
    source.replace("b", {"renamed": ()})
    assert sorted(source.names) == ["corner", "renamed", "row"]
    assert torch.equal(source.get("row"), TENSORS["a"][1])
    assert torch.equal(source.get("corner"), TENSORS["a"][0, 1:3])
    assert torch.equal(source.get("renamed"), TENSORS["b"])
    with user_error("tensor a", "missing"):
        source.get("a")


def test_a_missing_tensor_is_named_with_its_directory(tmp_path: Path) -> None:
    with user_error("tensor c", "missing", tmp_path):
        SafetensorsSource(_single(tmp_path)).get("c")


def test_a_missing_directory(tmp_path: Path) -> None:
    with user_error(tmp_path / "nowhere"):
        SafetensorsSource(tmp_path / "nowhere")


def test_a_directory_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with user_error(tmp_path, "model.safetensors"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 60, -4])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    file = _single(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with user_error(file, "cannot be read"):
        SafetensorsSource(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    (_sharded(tmp_path) / "model-b.safetensors").unlink()
    with user_error("index.json", "model-b.safetensors", "missing"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index(text: str, tmp_path: Path) -> None:
    (_sharded(tmp_path) / "model.safetensors.index.json").write_text(text)
    with user_error("index.json", "cannot be read"):
        SafetensorsSource(tmp_path)
