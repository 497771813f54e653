"""Transformer Engine's modules compute the losses, gradients and updates of the local ones."""

from __future__ import annotations

import pytest

from moiie_megatron.evaluation.layout_equivalence import differences, record_step
from moiie_megatron.mcore.parallel import ParallelContext
from tests.te.steps import Weights, packed, padded, tiny_config


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_one_step(te: ParallelContext, local: ParallelContext, rows: str) -> None:
    config = tiny_config()
    batches = [padded()] if rows == "padded" else packed()
    weights = Weights(config, local)
    want, got = (record_step(config, context, batches, weights) for context in (local, te))
    assert want is not None and got is not None and len(got) > 50
    worst = differences(got, want)
    assert {kind: worst[kind] for kind in worst if worst[kind][0] > 1e-4} == {}
