"""Initial router weights, for models that are built and for checkpoints that are written."""

from __future__ import annotations

import torch
from numpy.random import SeedSequence
from torch import Tensor


def fresh_gate(
    shape: tuple[int, ...], *, seed: int, layer_number: int, router: int, std: float
) -> Tensor:
    """N(0, std) weights that depend on (seed, layer, router) only.

    The process-wide generators differ between pipeline stages and depend on what was drawn
    before.  An upcycled model takes everything but its routers from the dense checkpoint; with
    routers that do not depend on the parallel layout, the whole run does not.

    Args:
        shape: ``(experts that the router scores, D)``.
        seed: Seed of the run.
        layer_number: Counts from 1.
        router: Index of the router in ``ExpertLayout.routers``.
        std: Standard deviation.

    Returns:
        fp32 on the CPU, because the CPU's generator gives the same numbers on every machine.
    """
    key = SeedSequence([seed, layer_number, router])
    generator = torch.Generator().manual_seed(int(key.generate_state(1)[0]))
    return torch.randn(shape, generator=generator) * std
