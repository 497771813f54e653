"""Weights loaded into tensor-, pipeline- and expert-parallel models give the golden losses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity import golden

ROOT = Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.distributed
@pytest.mark.slow
def test_every_layout_gives_the_golden_loss(tmp_path: Path) -> None:
    """Two ranks; read and upcycled weights.  1e-4: sums in another order, see golden.py."""
    dense = golden.dense_directory("llama", tmp_path / "dense")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--master-addr=127.0.0.1", f"--master-port={_free_port()}"),
        *(str(Path(__file__).with_name("assign_worker.py")), str(tmp_path), str(dense)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]

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
