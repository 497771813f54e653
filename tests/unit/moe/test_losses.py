"""The routers' losses by hand; the reference's and Megatron's numbers are in tests/parity.

Four tokens, the experts V S S T, top-2.  Probabilities before top-k, the two chosen in brackets:

                V       S       S       T
    a image   [0.5]  [0.25]    0.25     .
    b text      .      0.2    [0.5]   [0.3]
    c text      .     [0.6]   [0.3]    0.1
    d padding   .     [0.9]   [0.1]    0.0     counts nowhere
"""

from __future__ import annotations

import math

import torch

from moiie_megatron.moe.losses import balance_losses, routing_sums, z_losses

PROBS = [[0.5, 0.25, 0.25, 0.0], [0.0, 0.2, 0.5, 0.3], [0.0, 0.6, 0.3, 0.1], [0.0, 0.9, 0.1, 0.0]]
CHOSEN = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]]
MASKS = [[1, 0], [0, 1], [0, 1], [0, 0]]  # by router: vision, text
THREE = torch.tensor([3.0, 3.0])  # experts that each router scores

probs = torch.tensor(PROBS)
chosen = torch.tensor(CHOSEN, dtype=torch.bool)
masks = torch.tensor(MASKS, dtype=torch.bool)


def test_sums_by_hand() -> None:
    tokens, load, prob = routing_sums(probs, chosen, masks)
    assert tokens.tolist() == [1, 2]
    assert load.tolist() == [[1, 1, 0, 0], [0, 1, 2, 1]]
    assert torch.allclose(prob, torch.tensor([[0.5, 0.25, 0.25, 0], [0, 0.8, 0.8, 0.4]]))


def test_balance_loss_by_hand() -> None:
    """vision: f = 1 1 0, P = .5 .25 .25, 3 * (.5 + .25) = 2.25
    text:   f = .5 1 .5, P = .4 .4 .2, 3 * (.2 + .4 + .1) = 2.1"""
    loss = balance_losses(probs, chosen, masks, THREE).loss_G
    assert torch.allclose(loss, torch.tensor([2.25, 2.1]))


def test_gradient_of_the_balance_loss_by_hand() -> None:
    """C * f / (number of tokens) at every token of the router; padding has none."""
    leaf = probs.clone().requires_grad_()
    balance_losses(leaf, chosen, masks, THREE).loss_G.sum().backward()
    text = [0.0, 0.75, 1.5, 0.75]
    wanted = torch.tensor([[3.0, 3.0, 0.0, 0.0], text, text, [0.0] * 4])
    assert leaf.grad is not None and torch.allclose(leaf.grad, wanted)


def test_perfect_balance_gives_top_k() -> None:
    """Three text tokens, each expert chosen twice, all probabilities alike."""
    even = torch.full((3, 3), 1 / 3)
    map_ = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=torch.bool)
    everything = torch.ones(3, 1, dtype=torch.bool)
    loss = balance_losses(even, map_, everything, torch.tensor([3.0])).loss_G
    assert torch.allclose(loss, torch.tensor([2.0]))


def test_a_router_without_tokens_has_no_loss() -> None:
    leaf = probs.clone().requires_grad_()
    balance = balance_losses(leaf, chosen, torch.zeros(4, 2, dtype=torch.bool), THREE)
    balance.loss_G.sum().backward()
    assert balance.loss_G.tolist() == [0, 0]
    assert leaf.grad is not None and not leaf.grad.any()


def test_detached_sums_have_the_same_numbers() -> None:
    leaf = probs.clone().requires_grad_()
    balance = balance_losses(leaf, chosen, masks, THREE)
    assert balance.prob_GE.requires_grad and not balance.detach().prob_GE.requires_grad
    assert torch.equal(balance.detach().loss_G, balance.loss_G)


def test_z_loss_by_hand() -> None:
    """log-sum-exp: a ln(1+1+2) = ln 4, b ln(2+2+4) = ln 8, c ln(1+1+6) = ln 8."""
    no = float("-inf")
    exponentials = torch.tensor([[1.0, 1, 2, 0], [0, 2, 2, 4], [0, 1, 1, 6], [0, 9, 9, 9]])
    scores = torch.where(exponentials > 0, exponentials.log(), no)
    loss = z_losses(scores, masks, torch.tensor([1.0, 2.0]))
    assert torch.allclose(loss, torch.tensor([math.log(4) ** 2, math.log(8) ** 2]))
