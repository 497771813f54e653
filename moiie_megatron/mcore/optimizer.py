"""Megatron's optimizer, with steps left out whose loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron.core.optimizer import ChainedOptimizer


class SkipNonFiniteOptimizer(ChainedOptimizer):
    """Megatron-Core looks for NaN and Inf only where losses are scaled (fp16).

    Between its clipping and its update stands the norm of the whole gradient, the same number
    on every rank and not finite if any gradient is not: that is where this looks, at no cost.
    """

    def step_if(self, also: Callable[[], bool]) -> tuple[bool, float]:
        """Update, unless the gradient's norm is not finite or ``also()`` says no.

        Args:
            also: Asked once the gradient's norm is known; must be alike on all ranks.

        Returns:
            Whether weights and optimizer state were changed, and the norm before clipping.
        """
        self._also, self._norm = also, math.nan
        updated, _, _ = self.step()
        return bool(updated), self._norm

    def get_grad_norm(self) -> float:
        self._norm = float(super().get_grad_norm() or 0.0)
        return self._norm

    def step_with_ready_grads(self) -> bool:
        if not (math.isfinite(self._norm) and self._also()):
            return False
        return bool(super().step_with_ready_grads())
