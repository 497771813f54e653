"""The reference's exact balance loss: the tokens of all layers pooled before the product.

``K * sum_i f_i * P_i`` with f and P taken over the tokens of all MoE layers together (the
reference concatenates the router logits of its layers), instead of the mean of the layers'
losses.  Layers may then balance each other.

Shapes: L MoE layers, R routers, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moiie_megatron.moe.losses import Balance


class PooledLoads:
    """The loads of all MoE layers on the micro-batch that is being computed.

    The gradient of the pooled loss in one layer needs the loads of all layers, which are known
    when the backward pass starts.  That holds as long as a micro-batch's backward pass ends
    before the next one's forward pass begins: without pipeline parallelism.  A recomputed layer
    writes the same numbers again.
    """

    def __init__(self, layer_numbers: list[int]) -> None:
        self.places = {number: place for place, number in enumerate(layer_numbers)}
        self._tokens: list[Tensor | None] = [None] * len(layer_numbers)
        self._load: list[Tensor | None] = [None] * len(layer_numbers)
        self._prob: list[Tensor | None] = [None] * len(layer_numbers)

    def put(self, layer_number: int, balance: Balance) -> None:
        """Note one layer's sums (layers are counted from 0)."""
        place = self.places[layer_number]
        self._tokens[place] = balance.all_tokens_R.detach()
        self._load[place] = balance.all_load_RE.detach()
        self._prob[place] = balance.prob_RE.detach()

    def is_last(self, layer_number: int) -> bool:
        """Whether all layers have been put once this one has."""
        return self.places[layer_number] == len(self.places) - 1

    def share_RE(self) -> Tensor:
        """``f / N``: pooled share of tokens per expert, divided by the pooled tokens."""
        tokens_R1 = _sum(self._tokens).clamp(min=1.0).unsqueeze(1)
        return _sum(self._load) / tokens_R1 / tokens_R1

    def value_R(self, num_candidates_R: Tensor) -> Tensor:
        """The pooled loss of every router (this rank's part), without gradient."""
        return num_candidates_R * (self.share_RE() * _sum(self._prob)).sum(dim=1)

    def loss_R(self, prob_RE: Tensor, num_candidates_R: Tensor) -> Tensor:
        """A zero whose gradient is that of the pooled loss with respect to one layer."""
        return _PooledLoss.apply(prob_RE, num_candidates_R, self)


def _sum(parts: list[Tensor | None]) -> Tensor:
    assert all(part is not None for part in parts), "a MoE layer has not run yet"
    return torch.stack([part for part in parts if part is not None]).sum(dim=0)


class _PooledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prob_RE: Tensor, candidates_R: Tensor, loads: PooledLoads) -> Tensor:
        ctx.save_for_backward(candidates_R)
        ctx.loads = loads
        return prob_RE.new_zeros(prob_RE.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        (candidates_R,) = ctx.saved_tensors
        return (grad_R * candidates_R).unsqueeze(1) * ctx.loads.share_RE(), None, None
