"""Thirty steps of training give the committed numbers (``tests/data/loss_curve.json``).

Tolerance 1e-5, relative.  With the same vector units the curve is equal bit for bit.  Others (AVX2
or SSE in place of AVX-512, two threads in place of one) round sums differently: measured over all
thirty steps, no value moves by more than 2e-7.  Mistakes move more: a balance coefficient that is
1 % off moves the balance losses by 8e-4 and the gradient norm by 1e-4, a missing weight decay the
loss by 1.6e-4.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from tests.helpers.loss_curve import FILE, STEPS, train_curve

TOLERANCE = 1e-5


@pytest.fixture
def context() -> Iterator[ParallelContext]:
    torch.set_num_threads(1)
    yield init_parallel(ParallelConfig(), DistEnv(), device="cpu", seed=1234)
    destroy_parallel()


def test_thirty_steps(tmp_path: Path, context: ParallelContext) -> None:
    expected = json.loads(FILE.read_text())
    found = train_curve(tmp_path, context)
    assert list(found) == list(expected)
    assert found["step"] == expected["step"] == list(range(1, STEPS + 1))
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=0), name


def test_the_curve_shows_training() -> None:
    """The comparison would hold for a run in which nothing happens."""
    curve = json.loads(FILE.read_text())
    assert curve["lm_loss"][-1] < curve["lm_loss"][0] - 1
    assert len(set(curve["lr_moe"])) == STEPS
    assert max(curve["grad_norm"]) > 1  # clipped
    for name in ("aux_vision", "aux_text", "z_vision", "z_text"):
        assert min(curve[name]) > 0
