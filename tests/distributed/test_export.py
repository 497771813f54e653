"""A model exports to the same bytes from whatever parallel layout its checkpoint was written in."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from tests.distributed.export_worker import LAYOUTS
from tests.helpers.launch import command, run
from tests.helpers.tiny_hf import write_language, write_vision

FC1 = "language_model.decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_layout_exports_to_the_same_bytes(family: str, tmp_path: Path) -> None:
    llm, vision = write_language(tmp_path / "llm", family), write_vision(tmp_path / "vision")
    # Noise, so that no two experts are alike.
    source = upcycle_checkpoint(llm, vision, tmp_path / "source", UpcycleOptions(perturb=0.5))
    words = command("tests/distributed/export_worker.py", [source, tmp_path / "again"], processes=2)
    run(words, timeout=240).check()
    names = ("model.safetensors", "config.json")
    expected = export_checkpoint(source, tmp_path / "expected")
    shard_plan = set()
    for layout in LAYOUTS:
        folder = tmp_path / "again" / layout
        out = export_checkpoint(folder, tmp_path / f"out-{layout}")
        for name in names:
            assert (out / name).read_bytes() == (expected / name).read_bytes(), (layout, name)
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        shard_plan.add(str([chunk.sizes for chunk in metadata.state_dict_metadata[FC1].chunks]))
    assert len(shard_plan) > 1  # they really are cut in different ways
