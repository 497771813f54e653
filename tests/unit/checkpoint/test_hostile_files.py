"""No checkpoint runs code, whichever program reads it; a damaged file is named in one sentence."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from moiie_megatron.checkpoint import save_load
from moiie_megatron.checkpoint.directory import CONFIG_FILE
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.load import dump_config
from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.inspect_checkpoint import describe
from moiie_megatron.convert.open_model import open_weights
from moiie_megatron.convert.reshard import reshard_checkpoint
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.state import TrainState
from moiie_megatron.utils.dcp_metadata import MetadataError
from moiie_megatron.utils.errors import UserError
from tests.helpers.train_states import make_config, make_state, save, update
from tests.helpers.user_errors import user_error

Read = Callable[[Path, ParallelContext, TrainState], object]
READERS: dict[str, Read] = {
    "generate, evaluate, init_from": lambda folder, context, state: load_weights(
        folder, context, state.model
    ),
    "resume": lambda folder, context, state: save_load.load_checkpoint(
        folder, context, state.state_parts()
    ),
    "export": lambda folder, *_: export_checkpoint(folder, folder.with_name("export")),
    "inspect": lambda folder, *_: describe(folder),
    "verify": lambda folder, *_: open_weights(folder),
    "reshard": lambda folder, *_: reshard_checkpoint(
        folder, folder.with_name("resharded"), ParallelConfig()
    ),
}


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def good(
    tmp_path_factory: pytest.TempPathFactory, context: ParallelContext
) -> tuple[TrainState, Path]:
    """A state after one update, and its checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    config = make_config(folder)
    state = make_state(config, context, 1)
    update(state)
    checkpoint = save(folder / "step_0000001", context, state, 1)
    (checkpoint / CONFIG_FILE).write_text(dump_config(config))
    return state, checkpoint


def hide(place: str, metadata: Metadata, payload: Payload) -> object:
    """A ``.metadata`` with the payload somewhere in it."""
    name = next(iter(metadata.state_dict_metadata))
    if place == "a field that nobody reads":
        metadata.planner_data = {"a": payload}
    elif place == "an attribute":
        metadata.later = payload  # type: ignore[attr-defined]
    elif place == "a dtype":
        metadata.state_dict_metadata[name] = payload  # type: ignore[assignment]
    elif place == "beside it":
        return [payload, metadata]
    else:
        return payload
    return metadata


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "place", ["all of it", "beside it", "a field that nobody reads", "an attribute", "a dtype"]
)
def test_metadata_runs_nothing(
    place: str,
    reader: str,
    good: tuple[TrainState, Path],
    tmp_path: Path,
    context: ParallelContext,
) -> None:
    state, checkpoint = good
    folder = Path(shutil.copytree(checkpoint, tmp_path / "step_0000001"))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    hostile = hide(place, metadata, Payload(tmp_path / "ran"))
    (folder / ".metadata").write_bytes(pickle.dumps(hostile))
    with user_error(folder, ".metadata", "posix.mkdir"):
        READERS[reader](folder, context, state)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("reader", READERS)
def test_the_common_state_runs_nothing(
    reader: str,
    good: tuple[TrainState, Path],
    tmp_path: Path,
    context: ParallelContext,
) -> None:
    state, checkpoint = good
    folder = Path(shutil.copytree(checkpoint, tmp_path / "step_0000001"))
    common = torch.load(folder / "common.pt", weights_only=True)
    torch.save(common | {"hostile": Payload(tmp_path / "ran")}, folder / "common.pt")
    with user_error(folder, "common.pt", "posix.mkdir"):
        READERS[reader](folder, context, state)
    assert not (tmp_path / "ran").exists()


def test_a_stored_object_runs_nothing(
    good: tuple[TrainState, Path],
    tmp_path: Path,
    context: ParallelContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random states lie among the tensors, as a pickle."""
    state, _ = good
    with monkeypatch.context() as patched:
        patched.setattr(save_load, "_rng", lambda _: Payload(tmp_path / "ran"))
        folder = save(tmp_path / "step", context, state, 1)
    with user_error(folder, "posix.mkdir"):
        save_load.load_checkpoint(folder, context, state.state_parts())
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_is_called_an_object_runs_nothing(
    good: tuple[TrainState, Path], tmp_path: Path, context: ParallelContext
) -> None:
    """torch would read what ``.metadata`` calls an object as a pickle, wherever a tensor is due."""
    state, checkpoint = good
    folder = Path(shutil.copytree(checkpoint, tmp_path / "step_0000001"))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = next(n for n in metadata.state_dict_metadata if n.startswith("optimizer."))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        place = metadata.storage_data.pop(index)
        pickled = io.BytesIO()
        torch.save(Payload(tmp_path / "ran"), pickled)
        (folder / "hostile.distcp").write_bytes(pickled.getvalue())
        place.relative_path, place.offset = "hostile.distcp", 0
        place.length = len(pickled.getvalue())
        metadata.storage_data[type(index)(name)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with user_error(folder):
        save_load.load_checkpoint(folder, context, state.state_parts())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/hostname", "a/b", ""])
def test_tensors_lie_in_the_checkpoint(
    path: str, good: tuple[TrainState, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good[1], tmp_path / "step_0000001"))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with user_error(folder, ".metadata", path):
        describe(folder)


def test_classes_are_not_changed(tmp_path: Path) -> None:
    """An opcode sets attributes of whatever lies on the stack, classes included."""
    save_load.refuse_code_in_checkpoints()
    opcodes = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(dVevil\nI1\nsb."
    (tmp_path / ".metadata").write_bytes(opcodes)
    with pytest.raises(MetadataError):
        FileSystemReader(tmp_path).read_metadata()
    assert not hasattr(Metadata, "evil")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_damaged_file_is_one_sentence(
    name: str, good: tuple[TrainState, Path], tmp_path: Path, context: ParallelContext
) -> None:
    """Cut anywhere, or with any byte changed: it is read, or refused with its name."""
    state, checkpoint = good
    folder = Path(shutil.copytree(checkpoint, tmp_path / "step_0000001"))
    content, draw, refused = (folder / name).read_bytes(), random.Random(5), 0
    for number in range(60):
        place = draw.randrange(len(content))
        changed = bytes([content[place] ^ (1 << draw.randrange(8))])
        cut = content[:place] if number % 3 == 0 else content[:place] + changed
        (folder / name).write_bytes(cut if number % 3 == 0 else cut + content[place + 1 :])
        try:
            describe(folder)
            save_load.load_common(folder)
        except UserError as error:
            refused += 1
            assert name in str(error) or "format version" in str(error), error
            assert "\n" not in str(error)
    assert refused >= 15
    if name != "common.pt":
        (folder / name).unlink()
        with user_error(folder, f"{name} is missing"):
            load_weights(folder, context, state.model)
