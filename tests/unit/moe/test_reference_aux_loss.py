"""The pooled balance loss by hand; whole models against the reference are in tests/parity.

Two layers, one router over three experts, top-2; two tokens in each layer:

               layer 1                      layer 3
    token a   [0.5]  [0.3]   0.2           [0.6]   0.1   [0.3]
    token b   [0.4]   0.2   [0.4]           0.2   [0.5]  [0.3]

    load        2      1      1              1      1      2
    pooled f  = (2+1, 1+1, 1+2) / 4 tokens = 0.75  0.5  0.75
    pooled P  = (1.7, 1.1, 1.2) / 4 tokens
    loss      = 3 * (0.75 * 1.7 + 0.5 * 1.1 + 0.75 * 1.2) / 4 = 2.04375
"""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.config.schema import MoEConfig
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.moe.choose_experts import RoutingSums
from moiie_megatron.moe.losses import BalanceLoss
from moiie_megatron.moe.reference_aux_loss import PooledLoads
from moiie_megatron.routing_stats.load_stats import LoadStats
from tests.parity import tiny

PROBS = {
    1: [[0.5, 0.3, 0.2], [0.4, 0.2, 0.4]],
    3: [[0.6, 0.1, 0.3], [0.2, 0.5, 0.3]],
}
CHOSEN = {1: [[1, 1, 0], [1, 0, 1]], 3: [[1, 0, 1], [0, 1, 1]]}
LOSS = BalanceLoss([3], 2, torch.device("cpu"))


def sums(number: int) -> RoutingSums:
    """Those of a layer, whose tokens are all text."""
    prob, load = (torch.tensor(rows[number]).float().sum(dim=0) for rows in (PROBS, CHOSEN))
    load_ME = torch.stack([torch.zeros(3), load])
    return RoutingSums(torch.stack([torch.zeros(3), prob]), load_ME, load_ME)


def test_value_by_hand() -> None:
    loads = PooledLoads([1, 3])
    for number in PROBS:
        loads.update(number, sums(number))
    assert not loads.is_last(1) and loads.is_last(3)
    assert loads.all_load_ME().tolist() == [[0, 0, 0], [3, 2, 3]]
    assert torch.allclose(loads.value_G(LOSS), torch.tensor([2.04375]))


def test_gradient_by_hand() -> None:
    """C * f / tokens for every token of every layer: 3 * 0.75 / 4, 3 * 0.5 / 4, 3 * 0.75 / 4."""
    loads = PooledLoads([1, 3])
    for number in PROBS:
        loads.update(number, sums(number))
    gradient = LOSS.gradient(loads.all_load_ME())
    assert torch.allclose(gradient, torch.tensor([[0.5625, 0.375, 0.5625]]))


def test_the_next_micro_batch_replaces_the_numbers() -> None:
    loads = PooledLoads([1, 3])
    for number in PROBS:
        loads.update(number, sums(3))
    for number in PROBS:
        loads.update(number, sums(number))
    assert torch.allclose(loads.value_G(LOSS), torch.tensor([2.04375]))


def test_a_layer_that_has_not_run_is_a_bug() -> None:
    loads = PooledLoads([1, 3])
    loads.update(1, sums(1))
    with pytest.raises(KeyError):
        loads.all_load_ME()
    with pytest.raises(AssertionError):
        loads.update(2, sums(1))


@pytest.mark.parametrize("aux_loss", ["pooled", "per_layer"])
def test_recomputation_changes_nothing(context: ParallelContext, aux_loss: str) -> None:
    """Gradients and counters are equal to the last bit: a replayed layer writes the same loads."""
    results = []
    for section in ({}, {"recompute_granularity": "full", "recompute_method": "uniform"}):
        seed_everything(3, context.groups)
        moe = MoEConfig(aux_loss=aux_loss, vision_aux_loss_coeff=0.5, text_aux_loss_coeff=0.5)
        if section:
            section = {**section, "recompute_num_layers": 1}
        model = tiny.build(tiny.run_config(tiny.language("llama"), moe, megatron=section), context)
        tokens, positions, types, embeds = tiny.random_batch(3)
        labels = torch.where(types == 0, tokens, tiny.IGNORED)
        model(tokens, positions, types, labels=labels, inputs_embeds=embeds).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for module in model.modules():
            if isinstance(module, LoadStats):
                module.add_up()
        results.append(gradients | {n: b for n, b in model.named_buffers() if ".stats." in n})
    plain, replayed = results
    assert plain.keys() == replayed.keys() and any("gates" in name for name in plain)
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)
