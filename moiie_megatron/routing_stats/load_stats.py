"""What the routers of one layer did since their counters were read.

Shapes: M modalities (``MODALITIES``), R routers of the layer, E experts
(logical ids), A = M + 1: the modalities, and all tokens with padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moiie_megatron.layout.token_types import MODALITIES

_ROUTING = ("tokens_M", "load_ME", "prob_ME", "rows_A", "remote_A")
_LOSSES = ("aux_R", "z_R")


class LoadStats(torch.nn.Module):
    """Running sums of one layer, kept on its device and reduced only when they are logged.

    Buffers (not part of checkpoints; fp64, which counts exactly to 2**53 where fp32 stops at 17
    million): ``tokens_M`` tokens, ``load_ME`` tokens sent to each expert, ``prob_ME`` summed
    routing probability, ``rows_A`` rows that the dispatcher exchanged between expert-parallel
    ranks, ``remote_A`` those of them that went to another rank, and ``aux_R`` balance losses,
    ``z_R`` z-losses.  Only ``rows_A`` and ``remote_A`` know padding.
    """

    def __init__(self, num_routers: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        shapes = routing_shapes(num_experts) | dict.fromkeys(_LOSSES, (num_routers,))
        for name, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=torch.float64, device=device)
            self.register_buffer(name, zeros, persistent=False)

    @torch.no_grad()
    def add_tokens(self, tokens_M: Tensor, load_ME: Tensor, prob_ME: Tensor) -> None:
        """Count the choices of one micro-batch; everything covers this rank's tokens alone."""
        self.tokens_M += tokens_M
        self.load_ME += load_ME
        self.prob_ME += prob_ME.detach()

    @torch.no_grad()
    def add_losses(self, aux_R: Tensor, z_R: Tensor) -> None:
        """Add the losses of one micro-batch (this rank's parts)."""
        self.aux_R += aux_R
        self.z_R += z_R

    @torch.no_grad()
    def add_rows(self, masks_TM: Tensor, rows_TN: Tensor, own_rank: int) -> None:
        """Count the rows of a dispatch.

        Args:
            masks_TM: Tokens of each modality.
            rows_TN: Rows that each token becomes on each expert-parallel rank.
            own_rank: This expert-parallel rank.
        """
        masks_TA = torch.nn.functional.pad(masks_TM.float(), (0, 1), value=1.0)
        rows_AN = masks_TA.t() @ rows_TN.float()
        rows_A = rows_AN.sum(dim=1)
        self.rows_A += rows_A
        self.remote_A += rows_A - rows_AN[:, own_rank]

    def losses(self) -> Tensor:
        """Balance losses and z-losses as one vector ``(2 * R,)``."""
        return torch.cat([self.aux_R, self.z_R])

    def routing(self) -> Tensor:
        """Everything else as one vector, so that one collective reduces it (see ``unpack``)."""
        return torch.cat([getattr(self, name).flatten() for name in _ROUTING])

    def reset_losses(self) -> None:
        """Start over with what ``losses`` returns."""
        self.aux_R.zero_()
        self.z_R.zero_()

    def reset_routing(self) -> None:
        """Start over with what ``routing`` returns."""
        for name in _ROUTING:
            getattr(self, name).zero_()


def routing_shapes(num_experts: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the sums in ``LoadStats.routing``, in its order."""
    modalities = len(MODALITIES)
    per_expert, all_tokens = (modalities, num_experts), (modalities + 1,)
    return dict(
        zip(_ROUTING, ((modalities,), per_expert, per_expert, all_tokens, all_tokens), strict=True)
    )


def unpack(sums: Tensor, num_experts: int) -> dict[str, Tensor]:
    """The inverse of ``LoadStats.routing`` for a reduced vector."""
    shapes = routing_shapes(num_experts)
    parts = sums.split([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
