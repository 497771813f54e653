"""A flipped bit anywhere in a checkpoint is found by whatever reads weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moiie_megatron.checkpoint import manifest
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.checkpoint.manifest import MANIFEST_FILE, Manifest, damage, note_digests
from moiie_megatron.checkpoint.parallel_io import with_digests, write_in_turn
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import load_checkpoint, request_save
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.upcycle import upcycle_checkpoint
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.state import TrainState
from moiie_megatron.utils.digest import file_digest
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.train_states import make_config, make_state, update
from tests.helpers.user_errors import user_error


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory, context: ParallelContext
) -> tuple[TrainState, Path]:
    """A state and its checkpoint, with a manifest."""
    folder = tmp_path_factory.mktemp("good")
    state = make_state(make_config(folder), context, 1)
    update(state)
    request = request_save(folder / "step", context, state.state_parts(), Progress(1, 0))
    with_digests(write_in_turn(request)).execute_sync()
    manifest.write_manifest(folder / "step")
    return state, folder / "step"


def flip(file: Path, place: int = -100) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "__0_0.distcp"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_damage_is_found_before_weights_are_read(
    name: str,
    has_manifest: bool,
    good: tuple[TrainState, Path],
    tmp_path: Path,
    context: ParallelContext,
) -> None:
    state, checkpoint = good
    folder = Path(shutil.copytree(checkpoint, tmp_path / "step"))
    file = folder / name
    if has_manifest:
        flip(file, 3 if name == "metadata.json" else -100)
    else:  # as the first programs wrote it: cut and missing files are found
        (folder / MANIFEST_FILE).unlink()
        file.write_bytes(file.read_bytes()[:-40])
    with user_error(folder, name):
        load_weights(folder, context, state.model)
    with user_error(folder, name):
        load_checkpoint(folder, context, state.state_parts())


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_shard_that_is_missing(
    has_manifest: bool, good: tuple[TrainState, Path], tmp_path: Path, context: ParallelContext
) -> None:
    folder = Path(shutil.copytree(good[1], tmp_path / "step"))
    (folder / "__0_1.distcp").unlink()
    if not has_manifest:
        (folder / MANIFEST_FILE).unlink()
    with user_error(folder, "__0_1.distcp is missing"):
        load_weights(folder, context, good[0].model)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', '{"files": {"a": {"bytes": "x"}}}'])
def test_a_damaged_manifest(
    content: str, good: tuple[TrainState, Path], tmp_path: Path, context: ParallelContext
) -> None:
    folder = Path(shutil.copytree(good[1], tmp_path / "step"))
    (folder / MANIFEST_FILE).write_text(content)
    with user_error(folder, MANIFEST_FILE):
        load_weights(folder, context, good[0].model)


def test_conversions_find_it_too(tmp_path: Path) -> None:
    """In what upcycling wrote; the shard is read when its first tensor is needed."""
    llm, vision = write_language(tmp_path / "llm"), write_vision(tmp_path / "vision")
    checkpoint = upcycle_checkpoint(llm, vision, tmp_path / "checkpoint")
    assert damage(checkpoint) is None
    (shard,) = checkpoint.glob("*.distcp")
    flip(shard, shard.stat().st_size // 2)
    with user_error(checkpoint, shard.name, "not what was written"):
        export_checkpoint(checkpoint, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_large_files_are_digested_by_their_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And read in full only where weights are read."""
    for name in (".metadata", "metadata.json", "common.pt"):
        (tmp_path / name).write_bytes(b"1")
    shard = tmp_path / "__0_0.distcp"
    torch.save(torch.arange(1000), shard)
    monkeypatch.setattr(manifest, "_DIGEST_UP_TO", 1000)
    note_digests([shard, tmp_path / "common.pt"])
    digests: list[str] = []

    def digest(file: Path, kind: str = "sha256") -> str:
        digests.append(file.name)
        return file_digest(file, kind)

    monkeypatch.setattr(manifest, "file_digest", digest)
    manifest.write_manifest(tmp_path)
    assert shard.name not in digests
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [".metadata", "metadata.json", "common.pt", shard.name, MANIFEST_FILE]
    )
    flip(shard)
    assert damage(tmp_path) is None and shard.name not in digests
    listed = Manifest.read(tmp_path)
    assert listed is not None and "xxh3_128" in listed.files[shard.name]
    assert listed.first_fault(listed.files) == f"{shard.name} is not what was written"


@pytest.mark.parametrize("write", [write_in_turn, lambda request: request])
def test_both_kinds_of_saves_note_digests(
    write: Callable[..., object],
    good: tuple[TrainState, Path],
    tmp_path: Path,
    context: ParallelContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In front, and in the background with Megatron-Core's own writer."""
    monkeypatch.setattr(manifest, "_DIGEST_UP_TO", 1000)
    request = request_save(tmp_path / "step", context, good[0].state_parts(), Progress(1, 0))
    with_digests(write(request)).execute_sync()  # type: ignore[arg-type]
    shards = sorted((tmp_path / "step").glob("*.distcp"))
    assert len(shards) == 2
    for shard in shards:
        noted = shard.with_name(shard.name + ".xxh3_128").read_text()
        assert noted == file_digest(shard, "xxh3_128")
