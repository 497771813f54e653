"""Losses of the routers as pure functions.

Shapes: T tokens of this rank, E experts, R routers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Balance:
    """The balance losses of a layer's routers on one micro-batch.

    Attributes:
        loss_R: This rank's parts: the parts of the ranks that share the micro-batch add up to
            the loss of each router.
        tokens_R: Tokens of this rank that each router scored.
        load_RE: How many of them activate each expert.
        prob_RE: Their summed routing probabilities (with gradient).
        all_tokens_R: As ``tokens_R`` over all ranks that share the micro-batch.
        all_load_RE: As ``load_RE`` over all ranks that share the micro-batch.
    """

    loss_R: Tensor
    tokens_R: Tensor
    load_RE: Tensor
    prob_RE: Tensor
    all_tokens_R: Tensor
    all_load_RE: Tensor


def balance_losses(
    probs_TE: Tensor,
    routing_map_TE: Tensor,
    masks_TR: Tensor,
    num_candidates_R: Tensor,
    group: torch.distributed.ProcessGroup | None = None,
) -> Balance:
    """The Switch balance loss of every router: ``K * sum_i f_i * P_i`` (paper, section 3).

    ``f_i`` is the share of the router's tokens that activate expert i (so ``sum_i f_i`` is
    top-k) and ``P_i`` their mean routing probability; ``f`` carries no gradient.  Perfect balance
    gives top-k.  This is the reference's meaning; Megatron-Core's
    ``switch_load_balancing_loss_func`` on the same tokens is smaller by the factor top-k.  No
    token gives exactly 0 and keeps the graph alive.

    Args:
        probs_TE: Softmax over the experts of the token's router, before top-k; 0 elsewhere.
        routing_map_TE: True where a token activates an expert.
        masks_TR: True at tokens that a router scores and that are not padding.
        num_candidates_R: K, the number of experts that each router scores.
        group: Ranks that hold other tokens of the same micro-batch (sequence parallelism).
    """
    tokens_R, load_RE, prob_RE = routing_sums(probs_TE, routing_map_TE, masks_TR)
    all_tokens_R, all_load_RE = tokens_R, load_RE
    if group is not None and group.size() > 1:
        sums = torch.cat([tokens_R.unsqueeze(1), load_RE], dim=1)
        torch.distributed.all_reduce(sums, group=group)
        all_tokens_R, all_load_RE = sums[:, 0], sums[:, 1:]
    count_R1 = all_tokens_R.clamp(min=1.0).unsqueeze(1)
    products_RE = (all_load_RE / count_R1) * (prob_RE / count_R1)
    loss_R = num_candidates_R * products_RE.sum(dim=1)
    return Balance(loss_R, tokens_R, load_RE, prob_RE, all_tokens_R, all_load_RE)


def routing_sums(
    probs_TE: Tensor, routing_map_TE: Tensor, masks_TR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens under each mask, how many of them activate each expert, their summed probabilities.

    Args: see ``balance_losses``.

    Returns:
        ``(R,)``, ``(R, E)`` and ``(R, E)`` in the dtype of the probabilities.
    """
    masks_RT = masks_TR.to(probs_TE.dtype).t()
    load_RE = masks_RT @ routing_map_TE.to(probs_TE.dtype)
    return masks_RT.sum(dim=1), load_RE, masks_RT @ probs_TE


def z_losses(scores_TE: Tensor, masks_TR: Tensor, all_tokens_R: Tensor) -> Tensor:
    """The router z-loss (ST-MoE): mean squared log-sum-exp of the scores, by router ``(R,)``.

    This rank's part, like ``Balance.loss_R``.

    Args:
        scores_TE: Scores of the token's router, -inf at experts that it may not use.
        all_tokens_R: Tokens of each router over all ranks that share the micro-batch.
    """
    squares_T = torch.logsumexp(scores_TE.float(), dim=-1).square()
    return (masks_TR.float().t() @ squares_T) / all_tokens_R.clamp(min=1.0)
