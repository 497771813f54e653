"""The whole layer: three tokens by hand, physical order, what it refuses, checkpoint names."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.layer import MoIIELayer
from tests.unit.moe.layers import TimesFactor, build_layer

TYPES = torch.tensor([[IMAGE, TEXT, PADDING]], dtype=torch.int8)
ORDERS = [None, (2, 0, 3, 1)]  # logical expert by physical index


def by_hand(context: ParallelContext, order: tuple[int, ...] | None) -> MoIIELayer:
    """Gates of the example in moe/router.py; the experts V S S T multiply with 1, 10, 100, 1000."""
    layer = build_layer(context, physical_to_logical=order).eval()
    with torch.no_grad():
        layer.router.gates["vision"].copy_(torch.tensor([[1.0, 9, 9], [0, 9, 9], [2, 9, 9]]))
        layer.router.gates["text"].copy_(torch.tensor([[9.0, 0, 3], [9, 1, 0], [9, 0.5, 3]]))
    factors = (1.0, 10.0, 100.0, 1000.0)
    layer.experts = TimesFactor(*(factors[expert] for expert in order or range(4)))
    return layer


@pytest.mark.parametrize("order", ORDERS)
def test_three_tokens_by_hand(context: ParallelContext, order: tuple[int, ...] | None) -> None:
    """Unit vectors a, b, c:

                 V       S       S       T
    a image    0.2689    .    0.7311    .       1 * 0.2689 + 100 * 0.7311 = 73.375
    b text       .       .    0.6225  0.3775  100 * 0.6225 + 1000 * 0.3775 = 439.79
    c padding    .      0.5      .     0.5     10 * 0.5 + 1000 * 0.5 = 505
    """
    output, bias = by_hand(context, order)(torch.eye(3).unsqueeze(1), padding_mask=TYPES)
    assert bias is None
    wanted = torch.diag(torch.tensor([73.375, 439.787, 505.0])).unsqueeze(1)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-3)


def test_physical_order_changes_no_bit(context: ParallelContext) -> None:
    hidden = torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(0))
    first, second = (by_hand(context, order)(hidden, padding_mask=TYPES)[0] for order in ORDERS)
    assert torch.equal(first, second)


def test_token_types_are_required(context: ParallelContext) -> None:
    layer = build_layer(context)
    hidden = torch.zeros(6, 2, 3)
    with pytest.raises(ValueError, match=r"layer 1 .*none.* 6 .*2"):
        layer(hidden)
    with pytest.raises(ValueError, match=r"layer 1 .*\(2, 5\).*\(2, 6\)"):
        layer(hidden, padding_mask=torch.zeros(2, 5, dtype=torch.int8))


def test_tensor_parallelism_needs_sequence_parallelism(context: ParallelContext) -> None:
    groups = copy.copy(context.groups)
    groups.tp = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(ValueError, match=r"parallel\.tensor is 2.*parallel\.sequence"):
        build_layer(ParallelContext(context.device, groups, 0, 1))


@pytest.mark.parametrize("order", ORDERS)
def test_checkpoints_know_logical_experts(
    context: ParallelContext, order: tuple[int, ...] | None
) -> None:
    """The shard at physical index i carries the logical id order[i], with its own values."""
    layer = build_layer(context, physical_to_logical=order)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(torch.arange(4.0).view(4, 1, 1).expand_as(weight))
    state = layer.sharded_state_dict("mlp.")
    expert_keys = set()
    for entry in state.values():
        shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for shard in shards:
            if ".experts." in shard.key:
                expert_keys.add(shard.key)
                index = int(shard.data.flatten()[0])
                assert shard.global_offset[0] == (order or range(4))[index]
                assert shard.global_shape[0] == 4
    names = ("linear_fc1.weight", "linear_fc2.weight")
    assert expert_keys == {f"mlp.experts.experts.{name}" for name in names}
    gates = {entry.key for name, entry in state.items() if "gates" in name}
    assert gates == {"mlp.router.gates.vision", "mlp.router.gates.text"}


def test_expert_parameters_are_marked_for_megatron(context: ParallelContext) -> None:
    layer = build_layer(context)
    assert all(parameter.allreduce is False for parameter in layer.experts.parameters())
    assert not any(hasattr(gate, "allreduce") for gate in layer.router.parameters())
