"""What operations belong to, in a simulated step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from moiie_megatron.planning.trace import RankTrace
from tests.unit.simulation.tiny import simulate, tiny_config

WITH_PRODUCTS = ("vision", "connector", "attention", "dense_ffn", "router", "experts")
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def flops(trace: RankTrace) -> Counter[Any]:
    return Counter({(c.part, c.when): c.flops for c in trace.compute})


@pytest.fixture(scope="module")
def recomputed() -> Counter[Any]:
    return flops(simulate(tiny_config().model_copy(update={"megatron": FULL})))


def test_every_part_runs_in_its_passes(recomputed: Counter[Any]) -> None:
    for part in (*WITH_PRODUCTS, "output_layer"):
        forward, backward = recomputed[part, "forward"], recomputed[part, "backward"]
        assert forward > 0, part
        # Two products for each of the forward pass; scores of attention are computed again, and
        # images need no gradient.
        assert forward < backward <= 2.5 * forward, part
    assert not any(count for (_, when), count in recomputed.items() if when == "update")
    assert recomputed["embedding", "forward"] == 0


def test_a_replay_is_no_forward_pass(recomputed: Counter[Any]) -> None:
    for part in WITH_PRODUCTS[2:]:
        # Of the checkpoint's own backward pass one small product of the router counts here too.
        expected = pytest.approx(recomputed[part, "forward"], rel=0.05 if part == "router" else 0)
        assert recomputed[part, "recompute"] == expected, part
    for part in ("vision", "connector", "output_layer"):
        assert recomputed[part, "recompute"] == 0
