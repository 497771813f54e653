"""Megatron's optimizer, skipping updates whose gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer


class SkipNonFiniteOptimizer(ChainedOptimizer):
    """Skips the update if the gradient's norm is NaN or infinite.

    Megatron-Core checks for that only where losses are scaled (fp16).  ``ChainedOptimizer.step``
    computes the norm of the whole gradient (``get_grad_norm``, the same number on every rank),
    clips, and then updates (``step_with_ready_grads``); the check between the two costs nothing.
    """

    def step_if(self, should_apply: Callable[[], bool]) -> tuple[bool, float]:
        """Update the weights if the gradient's norm is finite and ``should_apply()`` is true.

        Args:
            should_apply: Called once the gradient's norm is known to be finite; must return the
                same on all ranks.

        Returns:
            Whether weights and optimizer state were changed, and the norm before clipping.
        """
        # Read by the two methods below, which step() calls in this order.
        self._should_apply, self._norm = should_apply, math.nan
        updated, _, _ = self.step()
        return bool(updated), self._norm

    def get_grad_norm(self) -> float:
        """Called by ``step`` before clipping."""
        self._norm = float(super().get_grad_norm() or 0.0)
        return self._norm

    def step_with_ready_grads(self) -> bool:
        """Called by ``step`` after clipping.

        Returns:
            Whether the weights were updated.
        """
        if not (math.isfinite(self._norm) and self._should_apply()):
            return False
        # Every part would gather the weights of the whole model: only the last one does.
        with ExitStack() as stack:
            for part in self.chained_optimizers[:-1]:
                stack.enter_context(_without_gathers(part))
            return bool(super().step_with_ready_grads())


@contextmanager
def _without_gathers(part: MegatronOptimizer) -> Iterator[None]:
    """A part of the optimizer updates without gathering what it has updated."""
    chunks: Any = getattr(part, "model_chunks", None)
    if chunks is None:  # not distributed
        yield
        return
    part.model_chunks = []
    try:
        yield
    finally:
        part.model_chunks = chunks
