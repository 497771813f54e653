"""The reference's exact balance loss: the tokens of all layers pooled before the product.

``C * sum_i f_i * P_i`` with f and P taken over the tokens of all MoE layers together (the
reference concatenates the router logits of its layers), instead of the mean of the layers'
losses.  Layers may then balance each other.

Shape letters: see ``moe/__init__.py``; C, f and P as in ``moe/losses.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moiie_megatron.moe.choose_experts import RoutingSums
from moiie_megatron.moe.losses import BalanceLoss


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
        self._sums: dict[int, RoutingSums] = {}

    def update(self, layer: int, sums: RoutingSums) -> None:
        """Store the sums of a layer, replacing those of the micro-batch before."""
        assert layer in self.layers, layer
        self._sums[layer] = sums

    def is_last(self, layer: int) -> bool:
        """Whether all layers have been updated once this one has."""
        return layer == self.layers[-1]

    def all_load_ME(self) -> Tensor:
        """Tokens that activate each expert, over all layers and ranks."""
        return torch.stack([sums.all_load_ME for sums in self._in_order()]).sum(dim=0)

    def value_G(self, loss: BalanceLoss) -> Tensor:
        """The pooled loss of every router (this rank's part)."""
        prob_ME = torch.stack([sums.prob_ME for sums in self._in_order()]).sum(dim=0)
        return loss.value(prob_ME, self.all_load_ME())

    def _in_order(self) -> list[RoutingSums]:
        return [self._sums[layer] for layer in self.layers]
