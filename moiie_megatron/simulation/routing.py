"""Experts of tokens, from how likely each expert is."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_experts(loads_E: Tensor, tokens: int, top_k: int) -> Tensor:
    """Different experts for every token, which are as frequent as they are likely.

    Nothing is random: tokens are spread evenly over the cumulated loads, so the counts are the
    expected ones to within one token.

    Args:
        loads_E: fp64, the probability of each expert to be among the chosen; adds up to top_k,
            none above 1.
        tokens: T.

    Returns:
        bool ``(T, E)``, top_k in each row.
    """
    ends_E = loads_E.cumsum(0)
    # Rounding must not leave a gap that an expert without load would fill.
    ends_E = torch.where(ends_E > top_k - 1e-9, float(top_k), ends_E)
    # The golden ratio visits [0, 1) evenly, whatever the number of tokens.
    offsets_T = (torch.arange(tokens, dtype=torch.float64) * 0.6180339887498949) % 1.0
    points_TK = offsets_T.unsqueeze(1) + torch.arange(top_k, dtype=torch.float64)
    chosen_TK = torch.searchsorted(ends_E, points_TK, right=True)
    return torch.zeros(tokens, len(loads_E), dtype=torch.bool).scatter_(1, chosen_TK, True)
