"""Single stored tensors: what torch reads and writes, and what is broken."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch.utils.serialization import config as serialization

from moiie_megatron.convert.dcp.tensor_archive import find_piece, read_piece, write_piece
from moiie_megatron.convert.tensor_bytes import FileRange, TensorBytes
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.utils.errors import UserError
from tests.helpers.user_errors import user_error

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
        places = [write_piece(stream, TensorBytes.of(tensor)) for tensor in TENSORS]
    content = (tmp_path / "file").read_bytes()
    for tensor, (offset, length) in zip(TENSORS, places, strict=True):
        loaded = torch.load(io.BytesIO(content[offset : offset + length]), weights_only=True)
        assert torch.equal(loaded, tensor) and loaded.dtype == tensor.dtype
        assert loaded.untyped_storage().nbytes() == tensor.nbytes


def test_an_archive_is_what_torch_writes(tmp_path: Path) -> None:
    """The version gate: byte for byte the installed torch's own archive, aligned alike."""
    for tensor in (TENSORS[0], TENSORS[1], torch.randn(300_000)):
        ours, theirs = io.BytesIO(), io.BytesIO()
        offset, length = write_piece(ours, TensorBytes.of(tensor))
        with serialization.patch({"save.compute_crc32": False}):
            torch.save(tensor, theirs)
        assert (offset, length) == (0, len(theirs.getvalue()))
        assert ours.getvalue() == theirs.getvalue()


def test_an_error_while_reading_the_values(tmp_path: Path) -> None:
    """Not inside torch's writer, which would hide it."""
    gone = FileRange(tmp_path / "gone", 0, 4)
    data = TensorBytes(TensorInfo((1,), torch.float32), [gone])
    with pytest.raises(UserError, match="gone cannot be read"):
        write_piece(io.BytesIO(), data)


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
        found = find_piece(file, shift, length)
        assert found.info == TensorInfo.of(tensor)
        values = found.tensor_bytes()
        assert (values is None) == (not tensor.is_contiguous())
        assert values is None or torch.equal(values.tensor(), tensor)
        if tensor.numel():
            read.add_(1)
            assert torch.equal(read_piece(file, shift, length), tensor)


def test_a_cut_off_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as stream:
        offset, length = write_piece(stream, TensorBytes.of(TENSORS[0]))
    whole = file.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:kept])
        with user_error(file, "cannot be read"):
            read_piece(file, offset, length)
    with user_error(tmp_path / "none", "cannot be read"):
        read_piece(tmp_path / "none", offset, length)


def test_other_objects(tmp_path: Path) -> None:
    """Nothing but tensors is unpickled."""
    for value in ({"a": torch.ones(2)}, "text", Path("x"), [torch.ones(1), torch.ones(1)]):
        with (tmp_path / "file").open("wb") as stream:
            torch.save(value, stream)
            length = stream.tell()
        with user_error("cannot be read"):
            read_piece(tmp_path / "file", 0, length)
