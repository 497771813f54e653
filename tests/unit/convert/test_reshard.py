"""A checkpoint cut for a layout: the same tensors, each rank's in pieces of their own."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import Metadata

from moiie_megatron.checkpoint.directory import FORMAT_VERSION
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.checkpoint.save_load import sharding_metadata
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.dcp.shard_plan import shard_plan
from moiie_megatron.convert.dcp.writer import CheckpointWriter
from moiie_megatron.convert.open_model import open_weights
from moiie_megatron.convert.reshard import reshard_checkpoint
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.convert.verify import compare_tensors
from moiie_megatron.families.weight_map import model_rows
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.utils.digest import same_bytes
from moiie_megatron.vlm.build import build_model
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import user_error

LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "pp2 ep4": ParallelConfig(pipeline=2, expert=4),
    "tp4 pp4 ep2 etp2": ParallelConfig(tensor=4, pipeline=4, expert=2, expert_tensor=2),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return write_language(folder / "llm"), write_vision(folder / "vision")


@pytest.fixture(scope="module")
def checkpoint(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "checkpoint"
    return upcycle_checkpoint(*sources, out, UpcycleOptions(perturb=0.1))


def _metadata(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_tensors_in_other_pieces(name: str, checkpoint: Path, tmp_path: Path) -> None:
    layout, out = LAYOUTS[name], tmp_path / "out"
    seen: list[tuple[int, int]] = []
    reshard_checkpoint(checkpoint, out, layout, progress=lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1] > seen[0][0] > 0
    report = compare_tensors(open_weights(checkpoint), open_weights(out))
    assert report.is_equal and report.compared == 84 and not report.other_dtype

    reader, metadata = CheckpointReader(out), _metadata(out)
    config = load_config(out / "run.yaml")
    assert config.parallel == layout
    assert config.model_copy(update={"parallel": ParallelConfig()}) == reader.config
    files: dict[str, set[tuple[object, ...]]] = {}
    rows = {row.megatron: row for row in model_rows(config)}
    for tensor, info in reader.tensors.items():
        expected = shard_plan(config, rows[tensor], info.shape)
        chunks = metadata.state_dict_metadata[tensor].chunks
        have = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks}
        assert have == {(cut.offsets, cut.shape) for cut in expected}
        assert sum(cut.numel for cut in expected) * info.dtype.itemsize == info.num_bytes
        owner = {cut.offsets: (cut.stage, cut.owner) for cut in expected}
        for index, place in metadata.storage_data.items():
            if index.fqn == tensor:
                files.setdefault(place.relative_path, set()).add(owner[tuple(index.offset)])
    assert all(len(owners) == 1 for owners in files.values())  # no rank reads another's file
    stages, experts = layout.pipeline, layout.expert * layout.expert_tensor
    # per stage: tensor ranks, replicated; experts in two layers, each on a stage
    assert len(files) == stages * (layout.tensor + 1) + min(stages, 2) * experts
    for file in ("tokenizer.json", "conversion_report.json"):
        assert (out / file).read_bytes() == (checkpoint / file).read_bytes()
    assert reader.common == CheckpointReader(checkpoint).common

    back = reshard_checkpoint(out, tmp_path / "back", ParallelConfig(expert=4))
    assert compare_tensors(open_weights(checkpoint), open_weights(back)).is_equal


@pytest.mark.parametrize("is_dense", [False, True])
def test_the_pieces_are_those_that_a_model_asks_for(
    is_dense: bool, sources: tuple[Path, Path], context: ParallelContext, tmp_path: Path
) -> None:
    """One rank; several are in tests/distributed."""
    options = UpcycleOptions(variant="dense" if is_dense else "moiie")
    checkpoint = upcycle_checkpoint(*sources, tmp_path / "checkpoint", options)
    out = reshard_checkpoint(checkpoint, tmp_path / "out", ParallelConfig())
    config = load_config(out / "run.yaml", ["train.device=cpu"])
    model = build_model(config, context)
    wanted: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for entry in nested_values(model.sharded_state_dict(metadata=sharding_metadata(context))):
        shards = [entry] if isinstance(entry, ShardedTensor) else []
        if isinstance(entry, ShardedTensorFactory):
            shards = list(nested_values(entry.build()))
        for shard in shards:
            shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
            wanted.setdefault(shard.key, set()).add((shard.global_offset, shape))
    tensors = _metadata(out).state_dict_metadata
    assert wanted == {
        name: {(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks}
        for name, entry in tensors.items()
    }
    load_weights(out, context, model)
    reader = CheckpointReader(out)
    weight = model.language_model.decoder.layers[2].mlp.linear_fc1.weight
    assert same_bytes(weight, reader.get("language_model.decoder.layers.2.mlp.linear_fc1.weight"))


def _with_optimizer(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A copy with optimizer state and something that is no tensor."""
    reader, moments = CheckpointReader(checkpoint), dict[str, torch.Tensor]()
    folder.mkdir()
    with CheckpointWriter(folder) as writer:
        for name, info in reader.tensors.items():
            writer.write(name, reader.get(name))
            if name.startswith("language_model.decoder.layers.1."):
                key = f"optimizer.state.exp_avg.{name}"
                moments[key] = torch.randn(info.shape)
                writer.write(key, moments[key])
        writer.write_object("rng/shard_0_1", b"state of a generator")
        writer.write_object("empty", b"")
        writer.finish(reader.common | {"optimizer": {"param_groups": [{"lr": 0.5}]}})
    for name in ("run.yaml", "tokenizer.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return moments


def test_optimizer_state_and_objects_are_carried(checkpoint: Path, tmp_path: Path) -> None:
    moments = _with_optimizer(checkpoint, tmp_path / "in")
    layout = ParallelConfig(tensor=2, expert=2)
    out = reshard_checkpoint(tmp_path / "in", tmp_path / "out", layout)
    reader, metadata = CheckpointReader(out), _metadata(out)
    assert moments
    for name, tensor in moments.items():
        assert same_bytes(reader.get(name), tensor)
        weight = name.removeprefix("optimizer.state.exp_avg.")
        of_weight, of_state = (metadata.state_dict_metadata[n].chunks for n in (weight, name))
        assert {c.offsets for c in of_weight} == {c.offsets for c in of_state}
    assert sorted(reader.objects) == ["empty", "rng/shard_0_1"]
    assert reader.get_object("rng/shard_0_1") == b"state of a generator"
    assert reader.get_object("empty") == b""
    assert reader.common["optimizer"] == {"param_groups": [{"lr": 0.5}]}


def test_layouts_that_cannot_be(
    checkpoint: Path, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    dense = upcycle_checkpoint(*sources, tmp_path / "dense", UpcycleOptions(variant="dense"))
    before = sorted(tmp_path.rglob("*"))
    for source, layout, parts in [
        (checkpoint, {"tensor": 3}, ("parallel.tensor", "3", "language.num_attention_heads")),
        (checkpoint, {"pipeline": 3}, ("parallel.pipeline", "3", "language.num_layers")),
        (checkpoint, {"expert": 8}, ("parallel.expert", "8", "4 experts")),
        (checkpoint, {"expert_tensor": 5}, ("parallel.expert_tensor", "5")),
        (dense, {"expert": 2}, ("parallel.expert", "2", "no experts", "at 1")),
    ]:
        with user_error(*parts):
            reshard_checkpoint(source, tmp_path / "out", ParallelConfig(**layout))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    layout, out = ParallelConfig(tensor=2), tmp_path / "out"

    def refused(source: Path, *parts: object) -> None:
        before = sorted(tmp_path.rglob("*"))
        with user_error(*parts):
            reshard_checkpoint(source, out, layout)
        assert sorted(tmp_path.rglob("*")) == before

    refused(tmp_path / "none", tmp_path / "none", "no checkpoint")
    _with_optimizer(checkpoint, tmp_path / "in")
    torch.save({"format_version": FORMAT_VERSION + 1}, tmp_path / "in" / "common.pt")
    refused(tmp_path / "in", tmp_path / "in", "version", FORMAT_VERSION + 1, "update")
    (tmp_path / "in" / "metadata.json").unlink()
    refused(tmp_path / "in", tmp_path / "in", "not a complete")
    reshard_checkpoint(checkpoint, out, layout)
    refused(checkpoint, out, "exists", "--force")
    reshard_checkpoint(checkpoint, out, ParallelConfig(expert=2), force=True)
    assert load_config(out / "run.yaml").parallel == ParallelConfig(expert=2)


def test_a_file_that_is_cut_off(checkpoint: Path, tmp_path: Path) -> None:
    _with_optimizer(checkpoint, tmp_path / "in")
    (file,) = (tmp_path / "in").glob("*.distcp")
    whole = file.read_bytes()
    for length, name in ((len(whole) - 5, "is cut off"), (len(whole) // 2, "cannot be read")):
        file.write_bytes(whole[:length])
        with user_error(file, name):
            reshard_checkpoint(tmp_path / "in", tmp_path / "out", ParallelConfig(tensor=2))
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_owners_follow_the_placement(checkpoint: Path) -> None:
    """Expert-parallel ranks hold V S and S T, whatever the numbers of the experts."""
    config = CheckpointReader(checkpoint).config
    name = "language_model.decoder.layers.3.mlp.experts.experts.linear_fc2.weight"
    row = next(row for row in model_rows(config) if row.megatron == name)
    for order in ("balanced", "contiguous"):
        moe = config.moe.model_copy(update={"placement": order})
        parallel = ParallelConfig(expert=2, pipeline=2)
        changed = config.model_copy(update={"moe": moe, "parallel": parallel})
        ranks: dict[int, list[int]] = {}
        for cut in shard_plan(changed, row, (4, 32, 48)):
            assert cut.stage == 1 and cut.shape == (1, 32, 48) and cut.owner[0] == "expert"
            ranks.setdefault(int(cut.owner[1]), []).append(cut.offsets[0])
        places = changed.placement.physical_to_logical
        assert ranks == {0: list(places[:2]), 1: list(places[2:])}
