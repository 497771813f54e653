"""Losses of the routers as pure functions.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Balance:
    """The balance losses of a layer's routers on one micro-batch.

    Attributes:
        loss_G: This rank's part of each router's loss: the parts of the ranks that share the
            micro-batch add up to the loss.
        tokens_G: Tokens of this rank that each router scored.
        load_GE: How many of them activate each expert.
        prob_GE: Their summed routing probabilities (with gradient).
        all_tokens_G: As ``tokens_G`` over all ranks that share the micro-batch.
        all_load_GE: As ``load_GE`` over all ranks that share the micro-batch.
    """

    loss_G: Tensor
    tokens_G: Tensor
    load_GE: Tensor
    prob_GE: Tensor
    all_tokens_G: Tensor
    all_load_GE: Tensor

    def detach(self) -> Balance:
        """The same numbers without gradient."""
        return Balance(*(getattr(self, field.name).detach() for field in fields(self)))


def balance_losses(
    probs_TE: Tensor,
    routing_map_TE: Tensor,
    masks_TG: Tensor,
    num_experts_G: Tensor,
    group: torch.distributed.ProcessGroup | None = None,
) -> Balance:
    """The Switch balance loss of every router: ``C * sum_i f_i * P_i`` (paper, section 3).

    ``f_i`` is the fraction of the router's tokens that activate expert i (so ``sum_i f_i`` is
    top-k) and ``P_i`` their mean routing probability; ``f`` carries no gradient.  Perfect balance
    gives top-k.  This is the reference's meaning; Megatron-Core's
    ``switch_load_balancing_loss_func`` on the same tokens is smaller by the factor top-k.  No
    token gives exactly 0 and keeps the graph alive.

    Args:
        probs_TE: Softmax over the experts of the token's router, before top-k; 0 elsewhere.
        routing_map_TE: True where a token activates an expert.
        masks_TG: True at tokens that a router scores and that are not padding.
        num_experts_G: C, the number of experts that each router scores.
        group: Ranks that hold other tokens of the same micro-batch (sequence parallelism).
    """
    tokens_G, load_GE, prob_GE = routing_sums(probs_TE, routing_map_TE, masks_TG)
    all_tokens_G, all_load_GE = tokens_G, load_GE
    if group is not None and group.size() > 1:
        sums = torch.cat([tokens_G.unsqueeze(1), load_GE], dim=1)
        torch.distributed.all_reduce(sums, group=group)
        all_tokens_G, all_load_GE = sums[:, 0], sums[:, 1:]
    count_G1 = all_tokens_G.clamp(min=1.0).unsqueeze(1)
    products_GE = (all_load_GE / count_G1) * (prob_GE / count_G1)
    loss_G = num_experts_G * products_GE.sum(dim=1)
    return Balance(loss_G, tokens_G, load_GE, prob_GE, all_tokens_G, all_load_GE)


def routing_sums(
    probs_TE: Tensor, routing_map_TE: Tensor, masks_TG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Count each router's tokens and their choices; the arguments are ``balance_losses``'.

    Returns:
        Tokens of each router ``(G,)``, how many of them activate each expert ``(G, E)``, and
        their summed probabilities ``(G, E)``, in the dtype of the probabilities.
    """
    masks_GT = masks_TG.to(probs_TE.dtype).t()
    load_GE = masks_GT @ routing_map_TE.to(probs_TE.dtype)
    return masks_GT.sum(dim=1), load_GE, masks_GT @ probs_TE


def z_losses(scores_TE: Tensor, masks_TG: Tensor, all_tokens_G: Tensor) -> Tensor:
    """The router z-loss (ST-MoE): mean squared log-sum-exp of the scores, by router ``(G,)``.

    This rank's part, like ``Balance.loss_G``.

    Args:
        scores_TE: Scores of the token's router, -inf at experts that it may not use.
        all_tokens_G: Tokens of each router over all ranks that share the micro-batch.
    """
    squares_T = torch.logsumexp(scores_TE.float(), dim=-1).square()
    return (masks_TG.float().t() @ squares_T) / all_tokens_G.clamp(min=1.0)
