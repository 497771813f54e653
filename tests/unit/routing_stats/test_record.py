"""What is reported about routing, worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import Placement
from moiie_megatron.routing_stats.load_stats import LayerSums
from moiie_megatron.routing_stats.record import (
    dead_experts,
    load_entropy,
    max_over_mean,
    routing_record,
)

LAYOUT = ExpertLayout(1, 2, 1)  # V0 S0 S1 T0
# The first rank holds V0 and T0.
PLACEMENT = Placement((0, 3, 1, 2), 2, 1.0, True)
SUMS = LayerSums(
    tokens_M=[8, 4],
    load_ME=[[8, 6, 2, 0], [0, 4, 0, 4]],
    prob_ME=[[4.0, 3.0, 1.0, 0.0], [0.0, 1.0, 0.5, 2.5]],
    rows_A=[12, 8, 23],
    remote_A=[6, 3, 10],
)
NOTHING = LayerSums([0, 0], [[0] * 4] * 2, [[0.0] * 4] * 2, [0, 0, 0], [0, 0, 0])


def test_a_record_by_hand() -> None:
    record = routing_record({1: SUMS, 3: NOTHING}, LAYOUT, PLACEMENT, row_bytes=100)
    assert record["version"] == 1 and record["top_k"] == 2 and record["row_bytes"] == 100
    assert record["experts"] == ["vision.0", "shared.0", "shared.1", "text.0"]
    assert record["ranks"] == [[0, 3], [1, 2]]
    layer = record["layers"]["1"]
    assert layer["vision"]["tokens"] == 8 and layer["vision"]["load"] == [8, 6, 2, 0]
    assert layer["vision"]["fraction"] == [1.0, 0.75, 0.25, 0.0]
    assert layer["vision"]["prob"] == [0.5, 0.375, 0.125, 0.0]
    assert layer["text"]["fraction"] == [0.0, 1.0, 0.0, 1.0]
    # Of the three experts that text may use, two get half of the load each.
    assert layer["text"]["entropy"] == pytest.approx(math.log(2) / math.log(3), abs=1e-9)
    # V0 8 + T0 4 against S0 10 + S1 2.
    assert layer["rank_load"] == [12, 12] and layer["max_over_mean"] == 1.0
    assert layer["dead"] == []
    # 23 rows in all, 20 of them of real tokens.
    assert layer["padding"] == {"rows": 3, "remote_rows": 1}
    assert record["moved"] == {
        "vision": {"rows": 12, "remote_rows": 6, "bytes": 600},
        "text": {"rows": 8, "remote_rows": 3, "bytes": 300},
        "padding": {"rows": 3, "remote_rows": 1, "bytes": 100},
    }
    assert json.loads(json.dumps(record)) == record


def test_a_layer_without_tokens_has_no_means() -> None:
    layer = routing_record({3: NOTHING}, LAYOUT, PLACEMENT, 1)["layers"]["3"]
    assert layer["vision"]["fraction"] == [0.0] * 4 and layer["vision"]["entropy"] is None
    assert layer["max_over_mean"] is None and layer["dead"] == []


def test_entropy() -> None:
    assert load_entropy([5, 5, 5, 5]) == pytest.approx(1.0)
    assert load_entropy([7, 0, 0]) == 0.0
    assert load_entropy([3, 1]) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    assert load_entropy([4]) == 1.0
    assert load_entropy([0, 0]) is None


def test_max_over_mean() -> None:
    assert max_over_mean([3, 1]) == 1.5
    assert max_over_mean([0, 0]) is None


def test_an_expert_is_dead_if_tokens_could_have_come() -> None:
    """Without image tokens nothing is known about the vision expert."""
    text_only = LayerSums([0, 4], [[0] * 4, [0, 4, 0, 4]], [[0.0] * 4] * 2, [0] * 3, [0] * 3)
    assert dead_experts(text_only, LAYOUT) == [2]
    both = LayerSums([4, 4], [[0, 4, 4, 0], [0, 4, 0, 4]], [[0.0] * 4] * 2, [0] * 3, [0] * 3)
    assert dead_experts(both, LAYOUT) == [0]


def test_one_joint_router_counts_both_modalities_apart() -> None:
    vanilla = ExpertLayout(0, 2, 0)
    sums = LayerSums([2, 2], [[2, 2], [2, 2]], [[1.0, 1.0], [1.5, 0.5]], [0] * 3, [0] * 3)
    layer = routing_record({0: sums}, vanilla, Placement((0, 1), 1, 1.0, True), 1)["layers"]["0"]
    assert layer["vision"]["prob"] == [0.5, 0.5] and layer["text"]["prob"] == [0.75, 0.25]
    assert layer["rank_load"] == [8] and layer["max_over_mean"] == 1.0
