"""Reading directories and files of weights, whole and broken."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moiie_megatron.convert.hf.reader import connector_reader, refuse_unused
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.families.transforms import TensorInfo
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


def _torch_single(folder: Path) -> Path:
    torch.save(TENSORS, folder / "pytorch_model.bin")
    return folder


def _torch_legacy(folder: Path) -> Path:
    """As torch before 1.6 wrote it, with what transformers 2 to 4 left in it."""
    content = OrderedDict(TENSORS)
    content._metadata = {"version": 1}  # type: ignore[attr-defined]
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def _torch_sharded(folder: Path) -> Path:
    for name, tensor in TENSORS.items():
        torch.save({name: tensor}, folder / f"pytorch_model-{name}.bin")
    index = {"weight_map": {name: f"pytorch_model-{name}.bin" for name in TENSORS}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


WRITERS = [_single, _sharded, _torch_single, _torch_legacy, _torch_sharded]


@pytest.mark.parametrize("write", WRITERS)
def test_reads_every_tensor(write, tmp_path: Path) -> None:
    source = WeightsSource(write(tmp_path))
    assert sorted(source.names) == ["a", "b"] and "a" in source and "c" not in source
    for name, tensor in TENSORS.items():
        assert source.info(name) == TensorInfo.of(tensor)
        assert torch.equal(source.get(name), tensor)
        assert torch.equal(source.get_bytes(name).tensor(), tensor)


@pytest.mark.parametrize("write", WRITERS)
def test_parts_of_a_tensor_in_its_place(write, tmp_path: Path) -> None:
    source = WeightsSource(write(tmp_path))
    assert source.shape("a") == (2, 3)
    source.replace("a", {"row": (1,), "corner": (0, slice(1, 3))})
    source.replace("b", {"renamed": ()})
    assert sorted(source.names) == ["corner", "renamed", "row"]
    assert torch.equal(source.get("row"), TENSORS["a"][1])
    assert torch.equal(source.get("corner"), TENSORS["a"][0, 1:3])
    assert torch.equal(source.get_bytes("corner").tensor(), TENSORS["a"][0, 1:3])
    assert torch.equal(source.get("renamed"), TENSORS["b"])
    with user_error("tensor a", "missing"):
        source.get("a")


def test_a_missing_tensor_is_named_with_its_directory(tmp_path: Path) -> None:
    with user_error("tensor c", "missing", tmp_path):
        WeightsSource(_single(tmp_path)).get("c")


def test_a_missing_directory(tmp_path: Path) -> None:
    with user_error(tmp_path / "nowhere"):
        WeightsSource(tmp_path / "nowhere")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"x")
    with user_error(tmp_path, "model.safetensors", "pytorch_model.bin"):
        WeightsSource(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 60, -4])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    file = _single(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with user_error(file, "cannot be read"):
        WeightsSource(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    (_sharded(tmp_path) / "model-b.safetensors").unlink()
    with user_error("index.json", "model-b.safetensors", "missing"):
        WeightsSource(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index(text: str, tmp_path: Path) -> None:
    (_sharded(tmp_path) / "model.safetensors.index.json").write_text(text)
    with user_error("index.json", "cannot be read"):
        WeightsSource(tmp_path)


OTHERS = {name: tensor + 1 for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("is_complete", [True, False])
def test_what_an_earlier_save_left_behind(is_complete: bool, tmp_path: Path) -> None:
    """transformers reads the single file first, and safetensors before ``.bin``."""
    _sharded(tmp_path)
    _torch_sharded(tmp_path)
    if not is_complete:
        (tmp_path / "model-b.safetensors").unlink()
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    save_file(OTHERS, tmp_path / "model.safetensors")
    source = WeightsSource(tmp_path)
    assert source.files == [tmp_path / "model.safetensors"]
    assert all(torch.equal(source.get(name), tensor) for name, tensor in OTHERS.items())


@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "safetensors"])
def test_a_file_by_itself(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file)
    assert torch.equal(WeightsSource(file).get("a"), TENSORS["a"])


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_that_would_run_code(is_new: bool, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    content = TENSORS | {"c": _Payload(tmp_path / "ran")}
    torch.save(content, file, _use_new_zipfile_serialization=is_new)
    with user_error(file, "posix.mkdir"):
        WeightsSource(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0, 4, 600, -4])
def test_a_truncated_torch_file(kept: int, tmp_path: Path) -> None:
    file = _torch_single(tmp_path) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:kept])
    with user_error(file, "cannot be read", "damaged"):
        WeightsSource(tmp_path)


@pytest.mark.parametrize("content", [torch.ones(2), [TENSORS], {1: torch.ones(2)}, {"a": 3}])
def test_a_torch_file_of_something_else(content: object, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file)
    with user_error(file, "no tensors by name"):
        WeightsSource(tmp_path)


def test_what_is_said_of_a_path_is_true(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with user_error(tmp_path / "model.gguf", "another kind", ".safetensors", ".bin"):
        WeightsSource(tmp_path / "model.gguf")
    with user_error(tmp_path / "none.bin", "There is no directory or file"):
        WeightsSource(tmp_path / "none.bin")


def test_quantised_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "pytorch_model.bin")
    with user_error("tensor a", "pytorch_model.bin", "torch.int8"):
        WeightsSource(tmp_path).info("a")


@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors", "other.pt"])
@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector."])
def test_a_projector(name: str, prefix: str, tmp_path: Path) -> None:
    """LLaVA's folder after stage 1, and the same file by itself."""
    shapes = {"0.weight": (24, 16), "0.bias": (24,), "2.weight": (32, 24), "2.bias": (32,)}
    weights = {prefix + key: torch.randn(shape) for key, shape in shapes.items()}
    file = tmp_path / name
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)
    for path in [file] if name == "other.pt" else [file, tmp_path]:
        reader = connector_reader(path)
        for ours, theirs in (("linear_1.weight", "0.weight"), ("linear_2.bias", "2.bias")):
            found = reader.get(f"connector.{ours}", None)
            assert found is not None and torch.equal(found, weights[prefix + theirs])


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    with user_error(tmp_path, "adapter_config.json", "LoRA", "merge_and_unload"):
        WeightsSource(tmp_path)


def test_an_adapter_that_was_not_merged() -> None:
    names = ["a", "base_model.model.model.layers.0.mlp.gate_proj.lora_A.default.weight"]
    with user_error("here", names[1], "merge_and_unload"):
        refuse_unused(names, {"a"}, [], "here")
