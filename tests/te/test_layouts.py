"""Training steps of two ranks: Transformer Engine's modules take the course of the local ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import command, run
from tests.te.layout_worker import LAYOUTS, VARIANTS


@pytest.mark.distributed
def test_layouts(tmp_path: Path) -> None:
    """Data, expert, tensor with sequence, and pipeline parallelism, also with virtual stages; with
    fused weight gradients, reductions that overlap with the backward pass, and recomputation.

    A gradient that a reduction waits for and does not get is an assertion in Megatron-Core: the
    ranks have micro-batches with and without images at the same time.
    """
    run(command("tests/te/layout_worker.py", [tmp_path], processes=2), timeout=280).check()
    for rank in (0, 1):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert results.keys() == LAYOUTS.keys()
        for layout, courses in results.items():
            want = courses.pop("local")
            assert courses.keys() == VARIANTS.keys() and len(want) == 4
            for variant, got in courses.items():
                for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
                    assert ours == pytest.approx(theirs, rel=1e-4), (layout, variant, rank, step)
