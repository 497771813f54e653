"""Two ranks load a resharded checkpoint: every piece that they ask for is one that was written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from moiie_megatron.checkpoint.directory import latest_checkpoint
from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.convert.reshard import reshard_checkpoint
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from tests.distributed.joint_runs import (
    SAVE_EVERY,
    STEPS,
    assert_same_course,
    go_back,
    joint_values,
)
from tests.helpers.launch import TRAIN, command, run
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.tiny_run import read_metrics, write_config

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-etp2": ParallelConfig(tensor=2, expert_tensor=2),
    "tp2-ep2": ParallelConfig(tensor=2, expert=2),
    "pp2": ParallelConfig(pipeline=2, pipeline_layers=[1, 3]),
    "pp2-virtual": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "ep2": ParallelConfig(expert=2),
}


# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_rank_finds_its_pieces(tmp_path: Path) -> None:
    vision, folders = write_vision(tmp_path / "vision"), []
    for name, layouts, changes in (
        ("llama", LAYOUTS, {}),
        # Tied embeddings matter where first and last layer are apart.
        ("llama", ["pp2"], {"tie_word_embeddings": True}),
        ("qwen2", ["tp2-ep2"], {}),
        ("qwen3", ["tp2-ep2"], {"head_dim": 16}),
    ):
        models = tmp_path / f"{name}-{len(layouts)}"
        llm = write_language(models / "llm", name, **changes)
        options = UpcycleOptions(perturb=0.1)
        original = upcycle_checkpoint(llm, vision, models / "original", options)
        folders += [
            reshard_checkpoint(original, models / layout, LAYOUTS[layout]) for layout in layouts
        ]
    arguments = [tmp_path, *folders]
    run(command("tests/distributed/reshard_worker.py", arguments, processes=2), 250).check()

    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for folder in folders:
        shards = [shard for rank in ranks for shard in rank[str(folder)]]
        assert shards and all(is_same for *_, is_same in shards)
        asked = {(name, tuple(offsets), tuple(shape)) for name, offsets, shape, _ in shards}
        metadata = pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
        written = {
            (name, tuple(chunk.offsets), tuple(chunk.sizes))
            for name, entry in metadata.items()
            for chunk in entry.chunks
        }
        assert asked == written


def test_a_run_goes_on_from_a_resharded_checkpoint(
    tmp_path: Path, digits: Path, single: Path, pair: Path
) -> None:
    """Optimizer state, schedule and progress included: the same course in another layout."""
    output = go_back(pair / "ep2", tmp_path / "run", STEPS - SAVE_EVERY)
    checkpoint = latest_checkpoint(output)
    assert checkpoint is not None
    reshard_checkpoint(checkpoint, checkpoint, ParallelConfig(tensor=2), force=True)
    values = joint_values(digits, output, single / "seed", checkpoint={"interval": SAVE_EVERY})
    run(command(TRAIN, [write_config(tmp_path / "run.yaml", values)]), timeout=120).check()
    assert_same_course(read_metrics(output), read_metrics(pair / "ep2"))
