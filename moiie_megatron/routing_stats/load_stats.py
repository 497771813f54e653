"""What the routers of one layer did since their counters were read.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import MODALITIES

_ROUTING = ("tokens_M", "load_ME", "prob_ME", "rows_A", "remote_A")
_LOSSES = ("aux_G", "z_G", "empty_G")
_MAX_COLLECTED = 256  # micro-batches


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

    The sums of micro-batches are collected as they are and added up when they are read, so that
    counting starts no kernel in a micro-batch.

    Buffers (not part of checkpoints; fp64, which counts exactly to 2**53 where fp32 stops at 17
    million): those of ``LayerSums``, and ``aux_G`` balance losses, ``z_G`` z-losses, ``empty_G``
    micro-batches in which a router scored no token.  Only ``rows_A`` and ``remote_A`` count
    padding.

    Args:
        num_routers: G.
        layout: Which experts exist.
        device: Where the sums are.
        measure: Balance losses and numbers of tokens by router, ``(n, G)`` each, of n micro-batches
            from ``prob_ME`` and ``all_load_ME`` with a leading axis n.
        ranks: Number of ranks that share a micro-batch; what they count adds up to one.
        ep_rank: This expert-parallel rank.
    """

    tokens_M: Tensor
    load_ME: Tensor
    prob_ME: Tensor
    rows_A: Tensor
    remote_A: Tensor
    aux_G: Tensor
    z_G: Tensor
    empty_G: Tensor

    def __init__(
        self,
        num_routers: int,
        layout: ExpertLayout,
        device: torch.device,
        measure: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        ranks: int = 1,
        ep_rank: int = 0,
    ) -> None:
        super().__init__()
        self.top_k = layout.top_k
        self.measure = measure
        self.ranks = ranks
        self.ep_rank = ep_rank
        shapes = _routing_shapes(layout.num_experts) | dict.fromkeys(_LOSSES, (num_routers,))
        for name, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=torch.float64, device=device)
            self.register_buffer(name, zeros, persistent=False)
        self._choices: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rows: list[tuple[Tensor, Tensor]] = []

    def add_choices(self, prob_ME: Tensor, load_ME: Tensor, all_load_ME: Tensor) -> None:
        """Count the choices of this rank's tokens of one micro-batch.

        Args:
            prob_ME: Summed routing probabilities.
            load_ME: Tokens that each expert got.
            all_load_ME: ``load_ME`` over all ranks that share the micro-batch.
        """
        self._choices.append((prob_ME, load_ME, all_load_ME))
        if len(self._choices) == _MAX_COLLECTED:
            self.add_up()

    def add_rows(self, masks_MT: Tensor, rows_TN: Tensor) -> None:
        """Count the rows of a dispatch.

        Args:
            masks_MT: Tokens of each modality.
            rows_TN: Rows that each token becomes on each expert-parallel rank.
        """
        self._rows.append((masks_MT.float() @ rows_TN.float(), rows_TN.sum(dim=0)))
        if len(self._rows) == _MAX_COLLECTED:
            self.add_up()

    @torch.no_grad()
    def add_up(self) -> None:
        """Add what has been collected to the buffers."""
        if self._rows:
            by_modality, all_tokens = (
                torch.stack(x).double().sum(dim=0) for x in _columns(self._rows)
            )
            rows_AN = torch.cat([by_modality, all_tokens.unsqueeze(0)])
            self._rows.clear()
            self.rows_A += rows_AN.sum(dim=1)
            self.remote_A += rows_AN.sum(dim=1) - rows_AN[:, self.ep_rank]
        if not self._choices:
            return
        probs, loads, all_loads = (torch.stack(x) for x in _columns(self._choices))
        self._choices.clear()
        self.prob_ME += probs.double().sum(dim=0)
        self.load_ME += loads.double().sum(dim=0)
        self.tokens_M += loads.double().sum(dim=(0, 2)) / self.top_k
        aux, tokens = self.measure(probs, all_loads)
        self.aux_G += aux.double().sum(dim=0)
        self.empty_G += (tokens == 0).double().sum(dim=0) / self.ranks

    @torch.no_grad()
    def add_aux(self, aux_G: Tensor) -> None:
        """Add this rank's parts of the balance losses of one micro-batch, measured elsewhere."""
        self.aux_G += aux_G

    @torch.no_grad()
    def add_z(self, z_G: Tensor) -> None:
        """Add this rank's parts of the z-losses of one micro-batch."""
        self.z_G += z_G

    def losses(self) -> Tensor:
        """Balance losses and z-losses as one vector ``(2 * G,)``."""
        self.add_up()
        return torch.cat([self.aux_G, self.z_G])

    def routing(self) -> Tensor:
        """The routing sums as one vector, so that one collective reduces it (``LayerSums``)."""
        self.add_up()
        return torch.cat([getattr(self, name).flatten() for name in _ROUTING])

    def reset_losses(self) -> None:
        """Set to zero what ``losses`` returns, and the number of micro-batches without tokens."""
        for name in _LOSSES:
            getattr(self, name).zero_()

    def reset_routing(self) -> None:
        """Set to zero what ``routing`` returns."""
        for name in _ROUTING:
            getattr(self, name).zero_()


def _columns(rows: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return list(zip(*rows, strict=True))


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
