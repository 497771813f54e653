"""Writer and reader of torch_dist checkpoints, against torch's own and each other."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from moiie_megatron.checkpoint.directory import CONFIG_FILE, FORMAT_VERSION
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.dcp.writer import CheckpointWriter
from moiie_megatron.convert.tensor_bytes import FileRange
from tests.helpers.user_errors import user_error

PLAIN = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(2.0)}
EXPERTS = torch.randn(4, 6, 2)
COMMON = {"format_version": FORMAT_VERSION, "progress": {"step": 0}}


def _write(folder: Path, common: dict[str, Any] | None = None, bytes_per_file: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    with CheckpointWriter(folder, bytes_per_file) as writer:
        for name, tensor in PLAIN.items():
            writer.write(name, tensor)
        for expert in (2, 0, 3, 1):
            place = writer.write_expert("experts", EXPERTS[expert], expert, 4)
            stored = place.find()
            assert stored.info.shape == (1, 6, 2) and stored.tensor_bytes() is not None
            assert torch.equal(stored.tensor_bytes().tensor()[0], EXPERTS[expert])
        writer.finish(common or COMMON)
    (folder / CONFIG_FILE).touch()
    return folder


@pytest.mark.parametrize("bytes_per_file", [1, 4000, 1 << 30])
def test_torch_reads_what_is_written(bytes_per_file: int, tmp_path: Path) -> None:
    folder = _write(tmp_path, bytes_per_file=bytes_per_file)
    files = list(folder.glob("*.distcp"))
    assert len(files) == {1: 7, 4000: 3, 1 << 30: 1}[bytes_per_file]
    state = {name: torch.zeros_like(tensor) for name, tensor in PLAIN.items()}
    state["experts"] = torch.zeros_like(EXPERTS)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    for name, tensor in (PLAIN | {"experts": EXPERTS}).items():
        assert torch.equal(state[name], tensor)


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    """The version gate, the other way round."""
    state = PLAIN | {"experts": EXPERTS}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    torch.save(COMMON, tmp_path / "common.pt")
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / CONFIG_FILE).touch()
    reader = CheckpointReader(tmp_path)
    assert reader.tensors.keys() == state.keys() and not reader.objects
    for name, tensor in state.items():
        assert torch.equal(reader.get(name), tensor)
        assert torch.equal(reader.get_bytes(name).tensor(), tensor)
    assert torch.equal(reader.get_bytes("experts", 2).tensor(), EXPERTS[2])


def test_metadata_is_torchs_own(tmp_path: Path) -> None:
    """Of the installed version: no field is missing, none has another type."""
    dcp.save(PLAIN, checkpoint_id=tmp_path / "torch", no_dist=True)
    with CheckpointWriter(_made(tmp_path / "ours")) as writer:
        for name, tensor in PLAIN.items():
            writer.write(name, tensor)
        writer.finish(COMMON)
    theirs, ours = (
        pickle.loads((tmp_path / name / ".metadata").read_bytes()) for name in ("torch", "ours")
    )
    assert vars(ours).keys() == vars(theirs).keys() and ours.version == theirs.version
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    for index, place in theirs.storage_data.items():
        mine = vars(ours.storage_data[index])
        assert {k: type(v) for k, v in mine.items()} == {k: type(v) for k, v in vars(place).items()}
    for name, entry in theirs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[name]
        assert (mine.size, mine.chunks) == (entry.size, entry.chunks)
        assert mine.properties.dtype == entry.properties.dtype


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_reads_what_is_written(tmp_path: Path) -> None:
    reader = CheckpointReader(_write(tmp_path))
    assert set(reader.tensors) == {*PLAIN, "experts"} and reader.common == COMMON
    for name, tensor in PLAIN.items():
        assert torch.equal(reader.get(name), tensor)
        assert torch.equal(reader.get_bytes(name).tensor(), tensor)
        assert reader.info(name).dtype == tensor.dtype
    assert torch.equal(reader.get("experts"), EXPERTS)
    for expert in range(4):
        assert torch.equal(reader.get("experts", expert), EXPERTS[expert])
    assert reader.info("experts", 1).shape == (6, 2)


def _cut(folder: Path, pieces: list[tuple[slice, ...]]) -> CheckpointReader:
    """A checkpoint of ``EXPERTS`` in several pieces, as ranks of some layout would write it."""
    with CheckpointWriter(folder) as writer:
        for piece in pieces:
            offsets = [part.start or 0 for part in piece]
            writer.write_part("experts", EXPERTS[piece], EXPERTS.shape, offsets)
        writer.finish(COMMON)
    (folder / CONFIG_FILE).touch()
    return CheckpointReader(folder)


PIECES = {
    "expert, gate and up": [
        (slice(e, e + 1), slice(r, r + 3), slice(None)) for e in range(4) for r in (0, 3)
    ],
    "columns of two experts": [
        (slice(e, e + 2), slice(None), slice(c, c + 1)) for e in (0, 2) for c in (0, 1)
    ],
    "uneven rows": [(slice(None), slice(0, 5), slice(None)), (slice(None), slice(5, 6))],
}


@pytest.mark.parametrize("name", PIECES)
def test_any_cut_is_put_together(name: str, tmp_path: Path) -> None:
    pieces = [piece + (slice(None),) * (3 - len(piece)) for piece in PIECES[name]]
    reader = _cut(tmp_path, pieces)
    for expert, tensor in ((None, EXPERTS), *enumerate(EXPERTS)):
        assert torch.equal(reader.get("experts", expert), tensor)
        assert torch.equal(reader.get_bytes("experts", expert).tensor(), tensor)


@pytest.mark.parametrize(("name", "is_in_files"), zip(PIECES, (True, False, True), strict=True))
def test_bytes_stay_in_the_files_where_they_are_in_order(
    name: str, is_in_files: bool, tmp_path: Path
) -> None:
    pieces = [piece + (slice(None),) * (3 - len(piece)) for piece in PIECES[name]]
    parts = _cut(tmp_path, pieces).get_bytes("experts", 1).parts
    assert all(isinstance(part, FileRange) for part in parts) == is_in_files


def test_a_missing_piece(tmp_path: Path) -> None:
    reader = _cut(tmp_path, PIECES["expert, gate and up"][:-1])
    with user_error("experts", "6 of its 12 values"):
        reader.get("experts", 3)
    with user_error("experts", "6 of its 12 values"):
        reader.get_bytes("experts", 3)
    assert torch.equal(reader.get("experts", 2), EXPERTS[2])


def test_a_piece_that_is_not_what_metadata_says(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    places = metadata.storage_data
    places[MetadataIndex("a", [0, 0])] = places[MetadataIndex("b", [0])]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with user_error(folder, "(5,)", "(3, 4)"):
        CheckpointReader(folder).get("a")
    with user_error(folder, "(5,)", "(3, 4)"):
        CheckpointReader(folder).get_bytes("a")


def test_tensors_and_experts_that_are_not_there(tmp_path: Path) -> None:
    reader = CheckpointReader(_write(tmp_path))
    with user_error(tmp_path, "tensor d"):
        reader.get("d")
    with user_error("experts", "4 experts"):
        reader.get("experts", 4)


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "common.pt"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_incomplete_folders(name: str, is_cut: bool, tmp_path: Path) -> None:
    file = _write(tmp_path) / name
    if is_cut and name != "metadata.json":
        file.write_bytes(file.read_bytes()[:20])
    else:
        file.unlink()
    with user_error(tmp_path, "not a complete"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("version", [None, FORMAT_VERSION + 1])
def test_other_versions(version: int | None, tmp_path: Path) -> None:
    _write(tmp_path, {"format_version": version})
    with user_error("format version", version, "update"):
        CheckpointReader(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with user_error(tmp_path, "no checkpoint"):
        CheckpointReader(tmp_path)
