"""Tensor-parallel replicas of weights stay equal although kernels are not reproducible.

Attention kernels of GPUs add up gradients in an order that changes from run to run, so that
tensor-parallel ranks get slightly different gradients for the same weights.  Kernels of the CPU
do not; here a worker adds the difference itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import command, run
from tests.helpers.tiny_run import tiny_values, write_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]


def test_replicas_stay_equal(tmp_path: Path, digits: Path) -> None:
    """Everything trains; the vision encoder is frozen; masks of dropout differ between ranks."""
    config = write_config(tmp_path / "run.yaml", tiny_values(digits, tmp_path / "unused"))
    words = [config, tmp_path, "parallel.tensor=2", "train.global_batch_size=2"]
    run(command("tests/distributed/replicas_worker.py", words, 2), timeout=200).check()
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        # The noise was there, and every weight that trains has moved.
        assert first["noisy gradients"] == 0
        assert second["noisy gradients"] == 3 * second["trained"] >= 3 * 4
        assert len(second["moved"]) == second["trained"]
        assert first["grad_norms"] == second["grad_norms"]
        assert {name: far for name, far in second["apart"].items() if far} == {}
        assert len(second["apart"]) > 60 and any("gates" in name for name in second["apart"])
    assert ranks[0][0]["trained"] > ranks[0][1]["trained"] == 4
    assert ranks[0][0]["grad_norms"] != ranks[0][2]["grad_norms"]
