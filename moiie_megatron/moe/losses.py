"""Balance losses as pure functions.

Shapes: T tokens of this rank, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Balance:
    """The balance loss of one router on one micro-batch.

    ``loss`` is this rank's part: the parts of the ranks that share the micro-batch add up to
    the loss.  ``tokens``, ``load_E`` and ``prob_E`` are sums over this rank's tokens.
    """

    loss: Tensor
    tokens: Tensor
    load_E: Tensor
    prob_E: Tensor


def balance_loss(
    probs_TE: Tensor,
    routing_map_TE: Tensor,
    mask_T: Tensor,
    num_candidates: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> Balance:
    """The Switch balance loss of one router: ``K * sum_i f_i * P_i`` (paper, section 3).

    ``f_i`` is the share of the router's tokens that activate expert i (so ``sum_i f_i`` is
    top-k) and ``P_i`` their mean routing probability; ``f`` carries no gradient.  Perfect balance
    gives top-k.  This is the reference's meaning; Megatron-Core's
    ``switch_load_balancing_loss_func`` on the same tokens is smaller by the factor top-k.  No
    token gives exactly 0 and keeps the graph alive.

    Args:
        probs_TE: Softmax over the router's experts, before top-k; 0 elsewhere.
        routing_map_TE: True where a token activates an expert.
        mask_T: True at tokens that this router scores and that are not padding.
        num_candidates: K, the number of experts that this router scores.
        group: Ranks that hold other tokens of the same micro-batch (sequence parallelism).
    """
    mask_T1 = mask_T.unsqueeze(1)
    tokens = mask_T.sum().float()
    load_E = (routing_map_TE & mask_T1).sum(dim=0).float()
    prob_E = (probs_TE * mask_T1).sum(dim=0)
    all_tokens, all_load_E = tokens, load_E
    if group is not None and group.size() > 1:
        sums = torch.cat([tokens.view(1), load_E])
        torch.distributed.all_reduce(sums, group=group)
        all_tokens, all_load_E = sums[0], sums[1:]
    count = all_tokens.clamp(min=1.0)
    loss = num_candidates * torch.sum((all_load_E / count) * (prob_E / count))
    return Balance(loss, tokens, load_E, prob_E.detach())
