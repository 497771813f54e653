"""What the routers of one layer did since the last log line.

Shapes: R routers of the layer, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LoadStats(torch.nn.Module):
    """Running sums of one layer, kept on its device and reduced only when they are logged.

    Buffers (fp32, not part of checkpoints): ``tokens_R`` scored tokens, ``load_RE`` tokens sent
    to each expert, ``prob_RE`` summed routing probability, ``aux_R`` balance losses.
    """

    tokens_R: Tensor
    load_RE: Tensor
    prob_RE: Tensor
    aux_R: Tensor

    def __init__(self, num_routers: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        for name, shape in (
            ("tokens_R", (num_routers,)),
            ("load_RE", (num_routers, num_experts)),
            ("prob_RE", (num_routers, num_experts)),
            ("aux_R", (num_routers,)),
        ):
            zeros = torch.zeros(shape, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros, persistent=False)

    @torch.no_grad()
    def add(self, router: int, tokens: Tensor, load_E: Tensor, prob_E: Tensor, aux: Tensor) -> None:
        """Add one micro-batch of one router; every argument covers this rank's tokens alone."""
        self.tokens_R[router] += tokens
        self.load_RE[router] += load_E
        self.prob_RE[router] += prob_E
        self.aux_R[router] += aux

    def packed(self) -> Tensor:
        """All sums in one vector ``(R * (2 E + 2),)``, so that one collective reduces a layer."""
        parts = (self.tokens_R, self.load_RE, self.prob_RE, self.aux_R)
        return torch.cat([part.flatten() for part in parts])

    def reset(self) -> None:
        """Start over; called after the sums were logged."""
        for buffer in self.buffers():
            buffer.zero_()


def unpack(sums: Tensor, num_routers: int, num_experts: int) -> dict[str, Tensor]:
    """The inverse of ``LoadStats.packed`` for a reduced vector."""
    r, e = num_routers, num_experts
    tokens_R, load, prob, aux_R = sums.split([r, r * e, r * e, r])
    return {
        "tokens_R": tokens_R,
        "load_RE": load.view(r, e),
        "prob_RE": prob.view(r, e),
        "aux_R": aux_R,
    }
