"""Fresh router weights, for models that are built and for checkpoints that are written."""

from __future__ import annotations

import torch
from numpy.random import SeedSequence
from torch import Tensor


def fresh_gate(
    shape: tuple[int, ...], *, seed: int, layer_number: int, router: int, std: float
) -> Tensor:
    """N(0, std) weights that are a pure function of (seed, layer, router).

    The process-wide generators differ between pipeline stages and depend on what was drawn
    before.  An upcycled model takes everything but its routers from the dense checkpoint, so
    with routers that do not depend on the layout its whole run does not; and layers do not
    share their draw.

    Args:
        shape: ``(experts that the router scores, hidden)``.
        layer_number: Counts from 1.
        router: Place of the router in ``ExpertLayout.routers``.

    Returns:
        fp32, on the CPU whatever the device: its generator gives the same everywhere.
    """
    key = SeedSequence([seed, layer_number, router])
    generator = torch.Generator().manual_seed(int(key.generate_state(1)[0]))
    return torch.randn(shape, generator=generator) * std
