"""Streamed safetensors files, read by the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moiie_megatron.convert.hf.safetensors_writer import INDEX, SafetensorsWriter
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.families.transforms import TensorInfo

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).bfloat16(),
    "c": torch.tensor(2.0),
    "d": torch.randn(4, 3).half().t(),
    "e": torch.arange(6.0).double()[2:],
}


def _write(folder: Path, bytes_per_file: int) -> SafetensorsWriter:
    announced = [(name, TensorInfo.of(tensor)) for name, tensor in TENSORS.items()]
    with SafetensorsWriter(folder, announced, bytes_per_file) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.finish()
    return writer


@pytest.mark.parametrize(("bytes_per_file", "count"), [(1, 5), (64, 2), (1 << 20, 1)])
def test_the_library_reads_it(bytes_per_file: int, count: int, tmp_path: Path) -> None:
    _write(tmp_path, bytes_per_file)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == count
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    assert WeightsSource(tmp_path).names == list(TENSORS)


def test_the_index(tmp_path: Path) -> None:
    _write(tmp_path, 64)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"]["a"] == "model-00001-of-00002.safetensors"
    assert index["weight_map"]["e"] == "model-00002-of-00002.safetensors"


def test_other_tensors_than_announced_are_our_mistake(tmp_path: Path) -> None:
    announced = [("a", TensorInfo((2,), torch.float32))]
    with SafetensorsWriter(tmp_path, announced) as writer, pytest.raises(AssertionError):
        writer.write("b", torch.zeros(2))
    with SafetensorsWriter(tmp_path, announced) as writer, pytest.raises(AssertionError):
        writer.write("a", torch.zeros(3))
    with SafetensorsWriter(tmp_path, announced) as writer, pytest.raises(AssertionError):
        writer.finish()
