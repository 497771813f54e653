"""Weights loaded into tensor-, pipeline- and expert-parallel models give the golden losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import command, run
from tests.parity import golden


@pytest.mark.distributed
@pytest.mark.slow
def test_every_layout_gives_the_golden_loss(tmp_path: Path) -> None:
    """Two ranks; read and upcycled weights.  1e-4: sums in another order, see golden.py."""
    dense = golden.dense_directory("llama", tmp_path / "dense")
    run(command("tests/distributed/assign_worker.py", [tmp_path, dense], processes=2), 240).check()

    moiie = golden.tensors("tiny_llama_moiie/outputs")
    parent = golden.tensors("tiny_llama_dense/outputs")
    want = [float(moiie[f"{case}.losses"][0]) for case in ("ones", "pad")]
    want_upcycled = [float(parent[f"{case}.loss"][0]) for case in ("ones", "pad")]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert set(ranks[0]) == set(ranks[1]) and len(ranks[0]) == 8
    for name in ranks[0]:
        expected = want_upcycled if name.endswith("-upcycled") else want
        for rank, results in enumerate(ranks):
            if name.startswith("pp2") and rank == 0:
                assert results[name] == []  # only the last stage has a loss
            else:
                assert results[name] == pytest.approx(expected, rel=1e-4), (name, rank)
