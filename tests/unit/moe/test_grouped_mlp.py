"""The experts module: the formula, idle experts, and its checkpoint."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.grouped_mlp import GroupedExperts
from tests.unit.moe.layers import config

HIDDEN, FFN = 6, 8


@pytest.fixture
def experts(context: ParallelContext) -> GroupedExperts:
    return GroupedExperts(3, config(HIDDEN), context.groups, device=torch.device("cpu"))


def test_the_formula(experts: GroupedExperts) -> None:
    """p * fc2(silu(gate(x)) * up(x)): two rows for expert 0, none for 1, one for 2."""
    rows = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    probs = torch.tensor([0.5, 0.25, 2.0])
    output, bias = experts(rows, torch.tensor([2, 0, 1]), probs)
    assert bias is None
    for row, expert in enumerate([0, 0, 2]):
        gate, up = experts.weight_fc1[expert][:FFN], experts.weight_fc1[expert][FFN:]
        inner = F.silu(gate @ rows[row]) * (up @ rows[row])
        wanted = probs[row] * (experts.weight_fc2[expert] @ inner)
        torch.testing.assert_close(output[row], wanted)


def test_an_expert_without_rows_gets_a_zero_gradient(experts: GroupedExperts) -> None:
    rows = torch.ones(3, HIDDEN)
    experts(rows, torch.tensor([2, 0, 1]), torch.ones(3))[0].sum().backward()
    for weight in (experts.weight_fc1, experts.weight_fc2):
        assert weight.grad is not None
        assert [bool(weight.grad[expert].any()) for expert in range(3)] == [True, False, True]


def test_the_checkpoint_of_megatrons_grouped_experts(experts: GroupedExperts) -> None:
    """One shard per expert; fc1 in two, gate and up."""
    state = experts.sharded_state_dict("experts.")
    fc1, fc2 = state["experts.weight_fc1"], state["experts.weight_fc2"]
    assert fc1.key == "experts.experts.linear_fc1.weight"
    assert fc2.key == "experts.experts.linear_fc2.weight"
    gate_and_up = fc1.build()
    assert [shard.global_shape for shard in gate_and_up] == [(3, 2 * FFN, HIDDEN)] * 6
    offsets = [(e, half * FFN, 0) for e in range(3) for half in (0, 1)]
    assert [shard.global_offset for shard in gate_and_up] == offsets
    assert torch.equal(fc1.merge_fn([s.data for s in gate_and_up]), experts.weight_fc1)
    down = fc2.build()
    assert [shard.global_offset for shard in down] == [(e, 0, 0) for e in range(3)]
    assert torch.equal(fc2.merge_fn([s.data for s in down]), experts.weight_fc2)
