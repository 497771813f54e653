"""Stages that train some parts of a model of Transformer Engine's modules."""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.mcore.parallel import ParallelContext
from tests.te.steps import (
    EXACT,
    RATES,
    disagreement,
    fused_weight_gradients,
    padded,
    take_step,
    tiny_config,
    with_section,
)


def test_first_stage_trains_the_connector_alone(
    te: ParallelContext, local: ParallelContext
) -> None:
    """A dense model, all of whose other weights stay as they are."""
    rates = {"connector": 1e-3}
    config = with_section(tiny_config(), "stage", moe=False, learning_rates=rates)
    batches = [padded(), padded(["text", "short"])]
    want, got = (take_step(config, context, batches) for context in (local, te))
    dense = {kind: limit for kind, limit in EXACT.items() if kind != "aux"}
    assert disagreement(got, want, dense) == {}
    grads = [name for name in got if name.startswith("grad/")]
    assert grads and all(name.startswith("grad/connector.") for name in grads)
    changed = {
        name.removeprefix("next/")
        for name in got
        if name.startswith("next/") and not torch.equal(got[name], got["start" + name[4:]])
    }
    assert changed and all(name.startswith("connector.") for name in changed)


@pytest.mark.parametrize("frozen", ["language", "moe", "vision", "connector"])
def test_frozen_parts(te: ParallelContext, local: ParallelContext, frozen: str) -> None:
    """With fused weight gradients, which a frozen weight has no buffer for."""
    rates = {part: rate for part, rate in RATES.items() if part != frozen}
    config = with_section(tiny_config(), "stage", learning_rates=rates)
    batches = [padded(), padded(["text", "short"])]
    want = take_step(config, local, batches)
    with fused_weight_gradients():
        got = take_step(config, te, batches)
    assert disagreement(got, want) == {}
