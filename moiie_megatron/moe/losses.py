"""Losses of the routers as pure functions.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BalanceLoss(torch.nn.Module):
    """The Switch balance loss of every router: ``C * sum_i f_i * P_i`` (paper, section 3).

    C is the number of experts that a router scores, ``f_i`` the fraction of its tokens that
    activate expert i (so ``sum_i f_i`` is top-k) and ``P_i`` their mean routing probability;
    ``f`` carries no gradient.  Perfect balance gives top-k.  This is the reference's meaning;
    Megatron-Core's ``switch_load_balancing_loss_func`` on the same tokens is smaller by the factor
    top-k.  A router without tokens has loss 0.

    Arguments of the methods are sums of one micro-batch over the tokens of each modality, or
    several of them along leading axes: ``prob_ME`` summed probabilities of this rank's tokens,
    ``all_load_ME`` how many tokens activate each expert, over all ranks that share the
    micro-batch.

    Args:
        num_experts: How many experts each router scores; a single one scores both
            modalities.
        top_k: Experts per token.
        device: Of the sums.
    """

    def __init__(self, num_experts: Sequence[int], top_k: int, device: torch.device) -> None:
        super().__init__()
        self.top_k = top_k
        self.is_joint = len(num_experts) == 1
        num_experts_G = torch.tensor(num_experts, dtype=torch.float32, device=device)
        self.num_experts_G: Tensor
        self.register_buffer("num_experts_G", num_experts_G, persistent=False)

    def by_router(self, sums_ME: Tensor) -> Tensor:
        """Sums by modality as sums by router ``(..., G, E)``."""
        return sums_ME.sum(dim=-2, keepdim=True) if self.is_joint else sums_ME

    def tokens(self, all_load_ME: Tensor) -> Tensor:
        """Tokens of each router, ``(..., G)``: every token activates top-k experts."""
        return self.by_router(all_load_ME).sum(dim=-1) / self.top_k

    def value(self, prob_ME: Tensor, all_load_ME: Tensor) -> Tensor:
        """This rank's part of each router's loss, ``(..., G)``.

        The parts of the ranks that share the micro-batch add up to the loss.
        """
        return (self.gradient(all_load_ME) * self.by_router(prob_ME)).sum(dim=-1)

    def gradient(self, all_load_ME: Tensor) -> Tensor:
        """The gradient of the losses with respect to the summed probabilities, ``(..., G, E)``.

        ``C * f_i`` over the number of tokens, by which the sums become means.
        """
        tokens_G1 = self.tokens(all_load_ME).clamp(min=1.0).unsqueeze(-1)
        loads_GE = self.by_router(all_load_ME)
        return self.num_experts_G.unsqueeze(-1) * loads_GE / tokens_G1 / tokens_G1


def z_losses(scores_TE: Tensor, masks_GT: Tensor, all_tokens_G: Tensor) -> Tensor:
    """The router z-loss (ST-MoE): mean squared log-sum-exp of the scores, by router ``(G,)``.

    This rank's part, like ``BalanceLoss.value``.

    Args:
        scores_TE: Scores of the token's router, -inf at experts that it may not use.
        masks_GT: 1 at tokens that a router scores and that are not padding, else 0.
        all_tokens_G: Tokens of each router over all ranks that share the micro-batch.
    """
    squares_T = torch.logsumexp(scores_TE.float(), dim=-1).square()
    return (masks_GT @ squares_T) / all_tokens_G.clamp(min=1.0)
