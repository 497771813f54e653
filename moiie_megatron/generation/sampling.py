"""How the next token is chosen from its scores: greedily, or drawn.

Shapes: b prompts, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings with the meaning that they have in transformers, applied in this order.

    Attributes:
        temperature: Scores are divided by it; 0 takes the most likely token.
        top_k: Draw among so many most likely tokens; None for all.
        top_p: Draw among the most likely tokens that together have this probability.
        seed: The same seed draws the same answers, whatever the batch and the parallel layout.

    Raises:
        UserError: A value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}: use 0 (greedy) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: use 1 or more, or leave it out.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: use a number above 0, up to 1.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


GREEDY: Final = Sampling()


class Sampler:
    """Chooses tokens for a batch of prompts.

    Args:
        sampling: The settings.
        numbers: Of the prompts: with the seed they determine what is drawn for each.
    """

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self._draws = [random.Random(f"{sampling.seed} {number}") for number in numbers]

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of every prompt, int64 ``(b,)``."""
        sampling = self.sampling
        if sampling.is_greedy:
            return logits.argmax(dim=-1)
        uniform = torch.tensor([draw.random() for draw in self._draws])
        count = logits.shape[1]
        kept = count if sampling.top_k is None else min(sampling.top_k, count)
        scores, ids = torch.topk(logits.float() / sampling.temperature, kept, dim=-1)
        probs = torch.softmax(scores, dim=-1)
        before = probs.cumsum(dim=-1) - probs  # of the more likely tokens
        probs = probs * (before < sampling.top_p)
        ends = probs.cumsum(dim=-1)
        target = uniform.to(ends)[:, None] * ends[:, -1:]
        # The first token whose end lies behind the target; rounding must not lead past the last.
        last = (probs > 0).sum(dim=-1, keepdim=True) - 1
        place = (ends <= target).sum(dim=-1, keepdim=True).minimum(last)
        return ids.gather(1, place).squeeze(1)
