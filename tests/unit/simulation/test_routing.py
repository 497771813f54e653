"""The experts of simulated tokens, here and on peers."""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.planning.routing import RoutingAssumption, balanced, skewed
from moiie_megatron.simulation.routing import SimulatedRouting
from tests.unit.simulation.tiny import WORKLOAD, simulated, tiny_config

CONFIG = tiny_config(tensor=2, expert=2)
LAYOUT, PLACEMENT = CONFIG.moe.layout, CONFIG.placement
SLACK = 6  # tokens
# (b, s): 300 image tokens, 600 of text, 100 of padding, which is routed like text.
TYPES = torch.tensor([[IMAGE] * 300 + [TEXT] * 600 + [PADDING] * 100], dtype=torch.int8)


@pytest.mark.parametrize(
    "assumption",
    [balanced(LAYOUT), skewed(LAYOUT, 1.4, PLACEMENT, 0.3)],
    ids=["balanced", "skewed"],
)
def test_loads_are_those_of_the_assumption(assumption: RoutingAssumption) -> None:
    routed = SimulatedRouting(assumption, PLACEMENT).route(1, (TYPES,))
    (logical_TE,) = routed.logical
    assert (logical_TE.sum(dim=1) == LAYOUT.top_k).all()
    for tokens, modality in ((slice(0, 300), "vision"), (slice(300, 1000), "text")):
        counts_E = logical_TE[tokens].sum(dim=0)
        number = len(logical_TE[tokens])
        expected_E = number * torch.tensor(assumption.loads(1, modality))  # type: ignore[arg-type]
        assert (counts_E - expected_E).abs().max() <= SLACK
        forbidden = set(range(LAYOUT.num_experts)) - set(LAYOUT.allowed(modality))  # type: ignore[arg-type]
        assert counts_E[sorted(forbidden)].sum() == 0


def test_parts_of_a_sequence_and_physical_order() -> None:
    routing = SimulatedRouting(balanced(LAYOUT), PLACEMENT)
    parts = tuple(part.contiguous() for part in TYPES.chunk(2, dim=1))
    routed = routing.route(1, parts)
    order = list(PLACEMENT.physical_to_logical)
    for part, logical_TE, physical_TP in zip(parts, routed.logical, routed.physical, strict=True):
        assert logical_TE.shape == (part.shape[1], LAYOUT.num_experts)
        assert torch.equal(physical_TP, logical_TE[:, order])
    assert routing.route(3, parts) is routed  # and the same ones in every layer


def test_ranks_see_each_others_tokens() -> None:
    """Two ranks have half of a sequence and half of the experts each: together all rows."""
    traces = [simulated(rank) for rank in (0, 1)]
    (batch,) = WORKLOAD.micro_batches
    for layer in CONFIG.moe_layers:
        rows = [trace.expert_rows[layer] for trace in traces]
        assert sum(map(sum, rows)) == batch.positions * LAYOUT.top_k
        assert all(len(of_rank) == 2 and min(of_rank) > 0 for of_rank in rows)
    sent = [
        sum(t.calls for t in trace.transfers if t.operation == "all_to_all_single")
        for trace in traces
    ]
    assert sent[0] == sent[1] > 0
