"""Bytes of tensors in files and in memory, and weight transforms of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from moiie_megatron.convert import tensor_bytes
from moiie_megatron.convert.tensor_bytes import FileRange, TensorBytes, transformed
from moiie_megatron.families import transforms
from moiie_megatron.families.transforms import TensorInfo, WeightTransform
from moiie_megatron.utils.digest import tensor_bytes as bytes_of
from moiie_megatron.utils.errors import UserError


def _stored(file: Path, tensor: Tensor, pieces: int = 1) -> TensorBytes:
    """A tensor in one or more pieces of a file, with something else around them."""
    content, parts = bytes_of(tensor), []
    step = -(-len(content) // pieces)
    with file.open("wb") as stream:
        for start in range(0, len(content), step):
            stream.write(b"around")
            piece = content[start : start + step]
            parts.append(FileRange(file, stream.tell(), len(piece)))
            stream.write(piece)
        stream.write(b"behind")
    return TensorBytes(TensorInfo.of(tensor), parts)


@pytest.mark.parametrize("block", [7, 64, 1 << 18])
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_bytes_are_moved_and_hashed(
    block: int, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory (no piece) and in files, in blocks of any size."""
    monkeypatch.setattr(tensor_bytes, "BLOCK", block)
    tensor = torch.randn(11, 5).bfloat16()
    for is_hashed in (False, True):
        data = _stored(tmp_path / "file", tensor, pieces) if pieces else TensorBytes.of(tensor)
        want = bytes(bytes_of(tensor))
        assert all(len(content) <= block for content in data.blocks())
        stream = io.BytesIO()
        data.write_to(stream, is_hashed=is_hashed)
        assert stream.getvalue() == want and data.digest == xxhash.xxh3_128(want).hexdigest()
        assert torch.equal(data.tensor(), tensor)


@pytest.mark.parametrize("tensor", [torch.tensor(3.0), torch.zeros(0, 4), torch.randn(4, 3).t()])
def test_other_shapes(tensor: Tensor) -> None:
    data = TensorBytes.of(tensor)
    assert data.tensor().shape == tensor.shape and torch.equal(data.tensor(), tensor)
    assert TensorBytes.of(data) is data


def test_a_file_that_is_cut_off_or_gone(tmp_path: Path) -> None:
    data = _stored(tmp_path / "file", torch.randn(8))
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-10])
    with pytest.raises(UserError, match="file is cut off"):
        _ = data.digest
    (tmp_path / "file").unlink()
    with pytest.raises(UserError, match="file cannot be read"):
        data.write_to(io.BytesIO(), is_hashed=False)


def test_an_error_of_the_stream_stays_its_own(tmp_path: Path) -> None:
    """The disk that is written to, not the file that is read, is the one to name."""

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        _stored(tmp_path / "file", torch.randn(8)).write_to(Full(), is_hashed=True)


TRANSFORMS = {
    "same": (transforms.same(), [(8, 6)]),
    "same, one axis": (transforms.same(), [(8,)]),
    "gate and up": (transforms.gate_up(), [(8, 6), (8, 6)]),
    "qkv": (transforms.qkv(4, 2), [(8, 6), (4, 6), (4, 6)]),
    "qkv, biases": (transforms.qkv(4, 2), [(8,), (4,), (4,)]),
    "qkv, one head each": (transforms.qkv(4, 4), [(8, 1), (8, 1), (8, 1)]),
    "stacked qkv": (transforms.stacked_qkv(4, 2), [(16, 6)]),
}


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_moves_bytes_without_reading(
    name: str, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform, shapes = TRANSFORMS[name]
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    inputs = [_stored(tmp_path / str(i), tensor, pieces) for i, tensor in enumerate(tensors)]
    whole = transform.to_megatron(tensors)

    monkeypatch.setattr(TensorBytes, "tensor", None)
    (fused,) = transformed(lambda parts: [transform.to_megatron(parts)], inputs)
    split = transformed(lambda parts: transform.to_hf(parts[0]), [fused])
    monkeypatch.undo()
    assert all(isinstance(part, FileRange) for part in fused.parts)
    assert fused.info == TensorInfo.of(whole) and torch.equal(fused.tensor(), whole)
    for data, tensor in zip(split, tensors, strict=True):
        assert data.info == TensorInfo.of(tensor) and torch.equal(data.tensor(), tensor)


def _only(function: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    return lambda parts: [function(parts[0])]


OTHERS = {
    "columns moved": lambda full: full.flip(1),
    "columns of a given number": lambda full: full[:, torch.tensor([3, 2, 1, 0])],
    "transposed": lambda full: full.t(),
    "another shape": lambda full: full.reshape(2, 8),
    "another dtype": lambda full: full.double(),
    "changed": lambda full: full + 1,
    "rows repeated": lambda full: full[torch.tensor([0, 0, 1, 2])],
    "rows left out": lambda full: full[:2],
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_function_gets_the_tensors(name: str, tmp_path: Path) -> None:
    tensor = torch.randn(4, 4)
    (data,) = transformed(_only(OTHERS[name]), [_stored(tmp_path / "file", tensor)])
    want = OTHERS[name](tensor)
    assert data.info == TensorInfo.of(want) and torch.equal(data.tensor(), want)


def test_more_than_two_axes(tmp_path: Path) -> None:
    """As patch embeddings have."""
    tensor = torch.randn(4, 3, 2, 2)
    transform: WeightTransform = transforms.same()
    data = _stored(tmp_path / "file", tensor)
    (same,) = transformed(lambda parts: transform.to_hf(parts[0]), [data])
    assert torch.equal(same.tensor(), tensor)
