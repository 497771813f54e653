"""What the routers of one layer did since their counters were read.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moiie_megatron.layout.token_types import MODALITIES

_ROUTING = ("tokens_M", "load_ME", "prob_ME", "rows_A", "remote_A")
_LOSSES = ("aux_G", "z_G", "empty_G")


@dataclass(frozen=True)
class LayerSums:
    """The routing sums of one layer on the host.

    Attributes:
        tokens_M: Tokens, without padding.
        load_ME: Tokens that each expert got.
        prob_ME: Summed routing probability.
        rows_A: Rows that the dispatcher exchanged between expert-parallel ranks.
        remote_A: Those of them that went to another rank.
    """

    tokens_M: Sequence[int]
    load_ME: Sequence[Sequence[int]]
    prob_ME: Sequence[Sequence[float]]
    rows_A: Sequence[int]
    remote_A: Sequence[int]

    @classmethod
    def from_vector(cls, sums: Tensor, num_experts: int) -> LayerSums:
        """The sums in a vector of ``LoadStats.routing``, as it is or reduced over ranks."""
        shapes = _routing_shapes(num_experts)
        parts = torch.split(sums.cpu(), [math.prod(shape) for shape in shapes.values()])
        values: dict[str, Any] = {}
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            array = part.view(shape)
            values[name] = (array if name == "prob_ME" else array.round().long()).tolist()
        return cls(**values)


class LoadStats(torch.nn.Module):
    """The same sums of one layer on its device, reduced over ranks only when they are logged.

    Buffers (not part of checkpoints; fp64, which counts exactly to 2**53 where fp32 stops at 17
    million): those of ``LayerSums``, and ``aux_G`` balance losses, ``z_G`` z-losses, ``empty_G``
    micro-batches in which a router scored no token.  Only ``rows_A`` and ``remote_A`` count
    padding.
    """

    tokens_M: Tensor
    load_ME: Tensor
    prob_ME: Tensor
    rows_A: Tensor
    remote_A: Tensor
    aux_G: Tensor
    z_G: Tensor
    empty_G: Tensor

    def __init__(self, num_routers: int, num_experts: int, device: torch.device) -> None:
        super().__init__()
        shapes = _routing_shapes(num_experts) | dict.fromkeys(_LOSSES, (num_routers,))
        for name, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=torch.float64, device=device)
            self.register_buffer(name, zeros, persistent=False)

    @torch.no_grad()
    def add_tokens(self, tokens_M: Tensor, load_ME: Tensor, prob_ME: Tensor) -> None:
        """Count the choices of this rank's tokens of one micro-batch."""
        self.tokens_M += tokens_M
        self.load_ME += load_ME
        self.prob_ME += prob_ME.detach()

    @torch.no_grad()
    def add_losses(
        self, aux_G: Tensor, z_G: Tensor, all_tokens_G: Tensor | None = None, ranks: int = 1
    ) -> None:
        """Add this rank's parts of the losses of one micro-batch.

        Args:
            all_tokens_G: Tokens that each router scored; None where each has some.
            ranks: Number of ranks that share the micro-batch; they add up to one.
        """
        self.aux_G += aux_G
        self.z_G += z_G
        if all_tokens_G is not None:
            self.empty_G += (all_tokens_G == 0) / ranks

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
        """Balance losses and z-losses as one vector ``(2 * G,)``."""
        return torch.cat([self.aux_G, self.z_G])

    def routing(self) -> Tensor:
        """The routing sums as one vector, so that one collective reduces it (``LayerSums``)."""
        return torch.cat([getattr(self, name).flatten() for name in _ROUTING])

    def reset_losses(self) -> None:
        """Set to zero what ``losses`` returns, and the number of micro-batches without tokens."""
        for name in _LOSSES:
            getattr(self, name).zero_()

    def reset_routing(self) -> None:
        """Set to zero what ``routing`` returns."""
        for name in _ROUTING:
            getattr(self, name).zero_()


def routing_size(num_experts: int) -> int:
    """Length of the vector of ``LoadStats.routing``."""
    return sum(math.prod(shape) for shape in _routing_shapes(num_experts).values())


def _routing_shapes(num_experts: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the routing sums, in the order of ``LoadStats.routing``."""
    modalities = len(MODALITIES)
    per_expert, all_tokens = (modalities, num_experts), (modalities + 1,)
    return dict(
        zip(_ROUTING, ((modalities,), per_expert, per_expert, all_tokens, all_tokens), strict=True)
    )
