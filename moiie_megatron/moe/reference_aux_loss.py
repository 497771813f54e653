"""The reference's exact balance loss: the tokens of all layers pooled before the product.

``C * sum_i f_i * P_i`` with f and P taken over the tokens of all MoE layers together (the
reference concatenates the router logits of its layers), instead of the mean of the layers'
losses.  Layers may then balance each other.

Shape letters: see ``moe/__init__.py``; C, f and P as in ``moe/losses.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moiie_megatron.moe.losses import Balance


class PooledLoads:
    """The loads of all MoE layers on the current micro-batch, for the pooled balance loss.

    One object belongs to one model and is shared by its routers.  The gradient of the pooled loss
    in one layer needs the loads of all layers, which are complete when the backward pass starts;
    the next micro-batch overwrites them.  So the backward pass of a micro-batch must end before
    the forward pass of the next one begins: the configuration refuses pipeline parallelism.
    Recomputation replays a layer inside the backward pass of its own micro-batch and writes the
    same numbers again.

    Args:
        layers: Numbers of the MoE layers, from 0, in the order in which they run.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._balances: dict[int, Balance] = {}

    def update(self, layer: int, balance: Balance) -> None:
        """Store the sums of a layer, replacing those of the micro-batch before."""
        assert layer in self.layers, layer
        self._balances[layer] = balance.detach()

    def is_last(self, layer: int) -> bool:
        """Whether all layers have been updated once this one has."""
        return layer == self.layers[-1]

    def loss_G(self, prob_GE: Tensor, num_experts_G: Tensor) -> Tensor:
        """A zero whose gradient is that of the pooled loss with respect to one layer.

        Args:
            prob_GE: Summed routing probabilities of that layer, with gradient.
            num_experts_G: C of every router.
        """
        return _PooledLoss.apply(prob_GE, num_experts_G, self)

    def value_G(self, num_experts_G: Tensor) -> Tensor:
        """The pooled loss of every router (this rank's part), without gradient."""
        prob_GE = torch.stack([b.prob_GE for b in self._in_order()]).sum(dim=0)
        return num_experts_G * (self.grad_coeff_GE() * prob_GE).sum(dim=1)

    def grad_coeff_GE(self) -> Tensor:
        """``f`` over the number of tokens, which times C is the gradient of the loss.

        The loss is ``C * sum_i f_i * P_i`` and ``P_i`` the summed probabilities over the number
        of tokens, so this is what multiplies the summed probabilities.
        """
        balances = self._in_order()
        tokens_G = torch.stack([b.all_tokens_G for b in balances]).sum(dim=0)
        load_GE = torch.stack([b.all_load_GE for b in balances]).sum(dim=0)
        tokens_G1 = tokens_G.clamp(min=1.0).unsqueeze(1)
        return load_GE / tokens_G1 / tokens_G1

    def _in_order(self) -> list[Balance]:
        return [self._balances[layer] for layer in self.layers]


class _PooledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prob_GE: Tensor, num_experts_G: Tensor, loads: PooledLoads) -> Tensor:
        ctx.save_for_backward(num_experts_G)
        ctx.loads = loads
        return prob_GE.new_zeros(prob_GE.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_G: Tensor) -> tuple[Tensor, None, None]:
        (num_experts_G,) = ctx.saved_tensors
        # Read here and not in forward: later layers had not run yet.
        coeff_GE = ctx.loads.grad_coeff_GE()
        return (grad_G * num_experts_G).unsqueeze(1) * coeff_GE, None, None
