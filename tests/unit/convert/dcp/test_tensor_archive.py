"""Single stored tensors: what torch reads and writes, and what is broken."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from moiie_megatron.convert.dcp.tensor_archive import read_piece, write_piece

TENSORS = [
    torch.arange(6.0).view(2, 3),
    torch.randn(5, 7).bfloat16(),
    torch.tensor(3.0),
    torch.arange(10)[3:8],  # part of a larger storage
    torch.arange(12.0).view(3, 4).t(),
    torch.zeros(0, 4),
]


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        places = [write_piece(stream, tensor) for tensor in TENSORS]
    content = (tmp_path / "file").read_bytes()
    for tensor, (offset, length) in zip(TENSORS, places, strict=True):
        loaded = torch.load(io.BytesIO(content[offset : offset + length]), weights_only=True)
        assert torch.equal(loaded, tensor) and loaded.dtype == tensor.dtype
        assert loaded.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("shift", [0, 1, 5000])
def test_what_torch_writes_is_read(shift: int, tmp_path: Path) -> None:
    """Also strided tensors and parameters, at any offset; the copy in memory is its own."""
    for tensor in [*TENSORS, torch.nn.Parameter(torch.randn(3))]:
        file = tmp_path / "file"
        with file.open("wb") as stream:
            stream.write(b"x" * shift)
            torch.save(tensor, stream)
            length = stream.tell() - shift
            stream.write(b"y" * 100)
        read = read_piece(file, shift, length)
        assert torch.equal(read, tensor) and read.dtype == tensor.dtype
        if tensor.numel():
            read.add_(1)
            assert torch.equal(read_piece(file, shift, length), tensor)


def test_a_cut_off_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as stream:
        offset, length = write_piece(stream, TENSORS[0])
    whole = file.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=f"{file} cannot be read"):
            read_piece(file, offset, length)
    with pytest.raises(ValueError, match="none cannot be read"):
        read_piece(tmp_path / "none", offset, length)


def test_other_objects(tmp_path: Path) -> None:
    """Nothing but tensors is unpickled."""
    for value in ({"a": torch.ones(2)}, "text", Path("x"), [torch.ones(1), torch.ones(1)]):
        with (tmp_path / "file").open("wb") as stream:
            torch.save(value, stream)
            length = stream.tell()
        with pytest.raises(ValueError, match="cannot be read"):
            read_piece(tmp_path / "file", 0, length)
