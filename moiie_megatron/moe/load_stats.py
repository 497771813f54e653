"""What the routers of one layer did since the last log line.

Shapes: R routers of the layer, E experts (logical ids).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moiie_megatron.moe.losses import Balance


class LoadStats(torch.nn.Module):
    """Running sums of one layer, kept on its device and reduced only when they are logged.

    Buffers (fp32, not part of checkpoints): ``tokens_R`` scored tokens, ``load_RE`` tokens sent
    to each expert, ``prob_RE`` summed routing probability, ``aux_R`` balance losses, ``z_R``
    z-losses, ``rows_R`` rows that the tokens became (one per token and rank that holds one of
    its experts), ``remote_R`` those of them that went to another rank.
    """

    def __init__(self, num_routers: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        for name, width in self._widths(num_experts).items():
            shape = (num_routers, width) if width else (num_routers,)
            zeros = torch.zeros(shape, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros, persistent=False)

    @staticmethod
    def _widths(num_experts: int) -> dict[str, int]:
        per_expert = {"load_RE": num_experts, "prob_RE": num_experts}
        return per_expert | dict.fromkeys(("tokens_R", "aux_R", "z_R", "rows_R", "remote_R"), 0)

    @torch.no_grad()
    def add(self, balance: Balance, aux_R: Tensor, z_R: Tensor) -> None:
        """Add one micro-batch; everything covers this rank's tokens alone."""
        self.tokens_R += balance.tokens_R
        self.load_RE += balance.load_RE
        self.prob_RE += balance.prob_RE.detach()
        self.aux_R += aux_R
        self.z_R += z_R

    @torch.no_grad()
    def add_rows(self, masks_TR: Tensor, sent_TN: Tensor, own_rank: int) -> None:
        """Count the rows of a dispatch.

        Args:
            masks_TR: Tokens of each router.
            sent_TN: bool, which expert-parallel ranks hold an expert of the token.
            own_rank: This expert-parallel rank.
        """
        rows_RN = masks_TR.float().t() @ sent_TN.float()
        self.rows_R += rows_RN.sum(dim=1)
        self.remote_R += rows_RN.sum(dim=1) - rows_RN[:, own_rank]

    def packed(self) -> Tensor:
        """All sums in one vector, so that one collective reduces a layer (see ``unpack``)."""
        return torch.cat([buffer.flatten() for buffer in self.buffers()])

    def reset(self) -> None:
        """Start over; called after the sums were logged."""
        for buffer in self.buffers():
            buffer.zero_()

    @classmethod
    def unpack(cls, sums: Tensor, num_routers: int, num_experts: int) -> dict[str, Tensor]:
        """The inverse of ``packed`` for a reduced vector."""
        widths = cls._widths(num_experts)
        parts = sums.split([num_routers * (width or 1) for width in widths.values()])
        return {
            name: part.view(num_routers, width) if width else part
            for (name, width), part in zip(widths.items(), parts, strict=True)
        }
