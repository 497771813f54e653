"""Let the MoE layers of a model take their experts from an assumption, in a real or a fake step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from moiie_megatron.moe import row_counts
from moiie_megatron.moe.dispatcher import destinations
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.moe.router import ModalityRouter
from moiie_megatron.simulation.routing import RoutedTokens, SimulatedRouting
from moiie_megatron.utils.replaced import replaced
from moiie_megatron.vlm.model import MoIIEModel


@contextmanager
def routed_by(routing: SimulatedRouting, groups: ProcessGroupCollection) -> Iterator[None]:
    """Within the block tokens go where ``routing`` says, and so do those of the peers.

    Routers still score and count, and their weights get gradients.  What peers would report of
    their tokens is computed here: simulated ones say nothing.
    """
    with ExitStack() as stack:
        routed = _RoutedLayers(routing, groups)
        for owner, name, substitute in routed.substitutes():
            stack.enter_context(replaced(owner, **{name: substitute}))
        yield


class _RoutedLayers:
    """State of ``routed_by``: the layer that is running, and the token types of micro-batches."""

    def __init__(self, routing: SimulatedRouting, groups: ProcessGroupCollection) -> None:
        self._routing = routing
        self._groups = groups
        # By the address of a rank's own part: that part, and the whole it was split from.
        self._types: dict[int, tuple[Tensor, Tensor]] = {}
        self._now: RoutedTokens | None = None

    def substitutes(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        split = MoIIEModel._split_like_hidden_states
        compute = MoIIELayer._compute
        choose = ModalityRouter.choose
        in_order = MoIIELayer._physical
        gather_counts = row_counts.gather_counts
        gather: Any = vars(token_dispatcher)["gather_from_sequence_parallel_region"]

        def split_types(model: MoIIEModel, token_types: Tensor) -> Tensor:
            part = split(model, token_types)
            self._types[part.data_ptr()] = part, token_types
            return part

        def compute_routed(layer: MoIIELayer, hidden: Tensor, token_types: Tensor) -> Any:
            with _disable_current_modes():
                self._now = self._route(layer, token_types)
            return compute(layer, hidden, token_types)

        def choose_routed(router: ModalityRouter, hidden: Tensor, types: Tensor) -> Any:
            choice = choose(router, hidden, types)
            own = self._tokens().logical[self._groups.tp.rank() % len(self._tokens().logical)]
            # Cloned by an operation, so that its memory counts like that of the router's own.
            return choice._replace(routing_map_TE=own.clone())

        def in_physical_order(layer: MoIIELayer, tensor_TE: Tensor) -> Tensor:
            if isinstance(tensor_TE, FakeTensor) or layer.physical_to_logical is None:
                return in_order(layer, tensor_TE)
            with _disable_current_modes():
                order = torch.tensor(layer.physical_to_logical)
            return tensor_TE.index_select(1, order)

        def gather_rows(counts: Tensor, group: Any) -> Tensor:
            gathered = gather_counts(counts, group)
            with _disable_current_modes():
                gathered.copy_(torch.cat(self._of_peers(self._row_counts)))
            return gathered

        def gather_any(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            gathered: Tensor = gather(values, *args, **kwargs)
            if values.is_floating_point():  # hidden states and probabilities
                return gathered
            with _disable_current_modes():
                is_map = values.dtype == torch.bool
                return torch.cat(self._of_peers((lambda m: m) if is_map else lambda m: m.sum(0)))

        yield MoIIEModel, "_split_like_hidden_states", split_types
        yield MoIIELayer, "_compute", compute_routed
        yield MoIIELayer, "_physical", in_physical_order
        yield ModalityRouter, "choose", choose_routed
        yield row_counts, "gather_counts", gather_rows
        yield token_dispatcher, "gather_from_sequence_parallel_region", gather_any

    def _route(self, layer: MoIIELayer, own: Tensor) -> RoutedTokens:
        _, whole = self._types[own.data_ptr()]
        parts = whole.shape[1] // own.shape[1]
        assert layer.layer_number is not None
        chunks = tuple(part.contiguous() for part in whole.chunk(parts, dim=1))
        return self._routing.route(layer.layer_number - 1, chunks)

    def _tokens(self) -> RoutedTokens:
        assert self._now is not None
        return self._now

    def _of_peers(self, measure: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Something of the map of every rank that exchanges tokens with this one."""
        maps = self._tokens().physical
        size = self._groups.tp.size()
        by_part = [measure(map_TP) for map_TP in maps]
        ranks = torch.distributed.get_process_group_ranks(self._groups.tp_ep)
        # Tensor-parallel ranks are neighbours in the job.
        return [by_part[rank % size % len(maps)] for rank in ranks]

    def _row_counts(self, map_TP: Tensor) -> Tensor:
        """What ``RowCounts`` is made of."""
        tokens_P, ep_size = map_TP.sum(dim=0), self._groups.ep.size()
        if ep_size == 1:
            rows_N = tokens_P.new_full((1,), len(map_TP))
        else:
            rows_N = destinations(map_TP, ep_size).sum(dim=0)
        return torch.cat([rows_N, tokens_P])
