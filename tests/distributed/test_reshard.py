"""Two ranks load a resharded checkpoint: every piece that they ask for is one that was written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from moiie_megatron.checkpoint.offline_upcycle import UpcycleOptions, upcycle_checkpoint
from moiie_megatron.checkpoint.reshard import reshard_checkpoint
from moiie_megatron.config.schema import ParallelConfig
from tests.helpers.launch import command, run
from tests.helpers.tiny_hf import write_language, write_vision

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-etp2": ParallelConfig(tensor=2, expert_tensor=2),
    "tp2-ep2": ParallelConfig(tensor=2, expert=2),
    "pp2": ParallelConfig(pipeline=2),
    "ep2": ParallelConfig(expert=2),
}


@pytest.mark.distributed
@pytest.mark.slow
def test_every_rank_finds_its_pieces(tmp_path: Path) -> None:
    vision, folders = write_vision(tmp_path / "vision"), []
    for is_tied in (False, True):
        models = tmp_path / f"tied-{is_tied}"
        llm = write_language(models / "llm", tie_word_embeddings=is_tied)
        options = UpcycleOptions(perturb=0.1)
        original = upcycle_checkpoint(llm, vision, models / "original", options)
        folders += [
            reshard_checkpoint(original, models / name, layout) for name, layout in LAYOUTS.items()
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
