"""What a model continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moiie_megatron.layout.token_types import TEXT


@dataclass(frozen=True)
class Prompt:
    """The encoded input that the model continues: n tokens, m images of S pixels per side.

    Attributes:
        tokens: int64 ``(n,)``.
        token_types: int8 ``(n,)``.
        images: uint8 ``(m, 3, S, S)``, in the order of their runs of image tokens.
    """

    tokens: Tensor
    token_types: Tensor
    images: Tensor

    def with_answer(self, ids: Sequence[int]) -> Prompt:
        """The prompt and tokens of text behind it."""
        new = torch.tensor(list(ids), dtype=torch.int64)
        types = torch.full(new.shape, TEXT, dtype=torch.int8)
        return replace(
            self,
            tokens=torch.cat([self.tokens, new]),
            token_types=torch.cat([self.token_types, types]),
        )
