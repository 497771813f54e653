"""The experts of all tokens of a micro-batch, on this rank and on its peers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moiie_megatron.layout.placement import Placement
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.planning.routing import RoutingAssumption
from moiie_megatron.planning.top_k_choice import EvenNumbers, top_k_choice


@dataclass(frozen=True)
class RoutedTokens:
    """The experts of the tokens of one micro-batch in one layer.

    Attributes:
        logical: bool ``(T, E)`` by tensor-parallel rank: under sequence parallelism each of them
            has other tokens.  Ranks that differ in their data alone route alike.
        physical: The same, with the experts in physical order.
    """

    logical: tuple[Tensor, ...]
    physical: tuple[Tensor, ...]


class SimulatedRouting:
    """Routes tokens by an assumption, the same way every time.

    Args:
        assumption: How likely each expert is.
        placement: Which expert is in which slot.
    """

    def __init__(self, assumption: RoutingAssumption, placement: Placement) -> None:
        self._assumption = assumption
        self._order = torch.tensor(placement.physical_to_logical)
        self._routed: dict[tuple[object, ...], RoutedTokens] = {}

    def route(self, layer: int, parts: tuple[Tensor, ...]) -> RoutedTokens:
        """Experts of a micro-batch.

        Args:
            layer: Index of the decoder layer, from 0.
            parts: Token types int8 ``(b, s)`` of every tensor-parallel rank.
        """
        loads = tuple(self._assumption.loads(layer, name) for name in ("vision", "text"))
        # Most layers have the same loads, and most micro-batches the same tokens.
        key = (loads, *(part.numpy().tobytes() for part in parts))
        if key not in self._routed:
            logical = tuple(self._map(loads, part.t().reshape(-1)) for part in parts)
            physical = tuple(part.index_select(1, self._order) for part in logical)
            self._routed[key] = RoutedTokens(logical, physical)
        return self._routed[key]

    def _map(self, loads: tuple[tuple[float, ...], ...], types_T: Tensor) -> Tensor:
        map_TE = torch.zeros(len(types_T), len(loads[0]), dtype=torch.bool)
        is_image = types_T == IMAGE
        for chosen, of_modality in ((is_image, loads[0]), (~is_image, loads[1])):
            if number := int(chosen.sum()):
                sample = top_k_choice(of_modality).sample(number, EvenNumbers())
                map_TE[chosen] = torch.from_numpy(sample)
        return map_TE
