"""The connector: image features into the language model's embedding space.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Connector(torch.nn.Module):
    """Linear, GELU, Linear (paper, section 3)."""

    def __init__(self, vision_size: int, hidden_size: int, language_size: int) -> None:
        super().__init__()
        self.linear_1 = torch.nn.Linear(vision_size, hidden_size)
        self.linear_2 = torch.nn.Linear(hidden_size, language_size)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(i, p, vision_size)`` to ``(i, p, language_size)``."""
        return self.linear_2(torch.nn.functional.gelu(self.linear_1(features)))
