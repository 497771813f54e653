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

from moiie_megatron.moe.losses import BalanceLoss, z_losses

PROBS = [[0.5, 0.25, 0.25, 0.0], [0.0, 0.2, 0.5, 0.3], [0.0, 0.6, 0.3, 0.1], [0.0, 0.9, 0.1, 0.0]]
CHOSEN = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]]
MASKS = [[1, 0], [0, 1], [0, 1], [0, 0]]  # by router: vision, text

probs = torch.tensor(PROBS)
chosen = torch.tensor(CHOSEN, dtype=torch.bool)
masks_GT = torch.tensor(MASKS).t().float()
prob_ME, load_ME = masks_GT @ probs, masks_GT @ chosen.float()
loss = BalanceLoss([3, 3], 2, torch.device("cpu"))


def test_tokens_of_each_router() -> None:
    assert loss.tokens(load_ME).tolist() == [1, 2]


def test_balance_loss_by_hand() -> None:
    """vision: f = 1 1 0, P = .5 .25 .25, 3 * (.5 + .25) = 2.25
    text:   f = .5 1 .5, P = .4 .4 .2, 3 * (.2 + .4 + .1) = 2.1"""
    assert torch.allclose(loss.value(prob_ME, load_ME), torch.tensor([2.25, 2.1]))
    both = loss.value(torch.stack([prob_ME, prob_ME]), torch.stack([load_ME, load_ME]))
    assert torch.allclose(both, torch.tensor([[2.25, 2.1]] * 2))


def test_gradient_of_the_balance_loss_by_hand() -> None:
    """C * f / (number of tokens)."""
    wanted = torch.tensor([[3.0, 3.0, 0.0, 0.0], [0.0, 0.75, 1.5, 0.75]])
    assert torch.allclose(loss.gradient(load_ME), wanted)


def test_perfect_balance_gives_top_k() -> None:
    """Three tokens of a joint router, each expert chosen twice, all probabilities alike."""
    joint = BalanceLoss([3], 2, torch.device("cpu"))
    prob_ME = torch.tensor([[2 / 3] * 3, [1 / 3] * 3])  # two image tokens and a text token
    load_ME = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    assert joint.tokens(load_ME).tolist() == [3]
    assert torch.allclose(joint.value(prob_ME, load_ME), torch.tensor([2.0]))


def test_a_router_without_tokens_has_no_loss() -> None:
    nothing = torch.zeros(2, 4)
    assert loss.value(nothing, nothing).tolist() == [0, 0] and not loss.gradient(nothing).any()


def test_z_loss_by_hand() -> None:
    """log-sum-exp: a ln(1+1+2) = ln 4, b ln(2+2+4) = ln 8, c ln(1+1+6) = ln 8."""
    no = float("-inf")
    exponentials = torch.tensor([[1.0, 1, 2, 0], [0, 2, 2, 4], [0, 1, 1, 6], [0, 9, 9, 9]])
    scores = torch.where(exponentials > 0, exponentials.log(), no)
    found = z_losses(scores, masks_GT, torch.tensor([1.0, 2.0]))
    assert torch.allclose(found, torch.tensor([math.log(4) ** 2, math.log(8) ** 2]))
