"""The MoIIE token dispatcher: every token travels once to each rank that holds its experts.

Megatron's ``alltoall`` dispatcher sends one row per (token, expert): a token whose two experts
are on one rank is sent twice.  Here a row is sent to a rank once, with the probabilities of all
experts of that rank; the receiver copies it to its experts, adds up their outputs, and sends one
row back.  One dispatch and one combine serve all modalities over the joint expert ids.

Three tokens, four experts on two ranks (experts 0 and 1 on rank 0, 2 and 3 on rank 1):

    routing_map_TP   0  1 | 2  3     alltoall sends                this dispatcher sends
    token a          x  x | .  .     a to 0, a to 1                a to rank 0
    token b          .  x | x  .     b to 1, b to 2                b to rank 0, b to rank 1
    token c          .  . | .  x     c to 3                        c to rank 1
                                     5 rows                        4 rows

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.moe.permutation import RowPermutation
from moiie_megatron.moe.row_counts import DispatchSplits, RowCounts

# The probability of a row at an expert that it is not routed to.  Not 0, which a router may give
# to an expert that it has chosen.
_NOT_ROUTED = -1.0


@dataclass
class Dispatched:
    """State that dispatch leaves for combine.

    Attributes:
        hidden_shape: Shape of the hidden states that were dispatched.
        counts: Row counts.
        to_ranks: Copies of tokens to ranks; None with a single expert-parallel rank.
        to_experts: Copies of received rows to local experts; set by ``dispatch_postprocess``.
            None with a single local expert, which takes the received rows as they are.
    """

    hidden_shape: torch.Size
    counts: RowCounts
    to_ranks: RowPermutation | None
    to_experts: RowPermutation | None = None


def destinations(routing_map_TP: Tensor, ep_size: int) -> Tensor:
    """The expert-parallel ranks that hold an expert of each token, bool ``(T, N)``."""
    tokens, experts = routing_map_TP.shape
    if experts == ep_size:
        return routing_map_TP
    return routing_map_TP.view(tokens, ep_size, experts // ep_size).any(dim=2)


def rows_by_rank(routing_map_TP: Tensor, ep_size: int, dispatcher: str) -> Tensor:
    """Number of rows that each token becomes on each expert-parallel rank, ``(T, N)``.

    Args:
        routing_map_TP: bool, the chosen experts.
        ep_size: N.
        dispatcher: ``moe.dispatcher``: ``moiie`` and ``flex`` send a token once to every rank
            that holds one of its experts, ``alltoall`` once per expert, ``allgather`` once to
            every rank.
    """
    if dispatcher == "allgather":
        return routing_map_TP.new_ones(len(routing_map_TP), ep_size)
    if dispatcher == "alltoall":
        return routing_map_TP.view(len(routing_map_TP), ep_size, -1).sum(dim=2)
    return destinations(routing_map_TP, ep_size)


class MoIIETokenDispatcher(MoETokenDispatcher):
    """Replaces Megatron's ``MoEAlltoAllTokenDispatcher``, with the same six methods.

    A token may have any number of experts, also none (its output is 0 then).  Up to two experts
    per token the output and the input gradients are bitwise those of ``alltoall`` with the same
    experts: every sum has two terms, and rows reach each expert in the same order.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.groups = pg_collection
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        # From dispatch_preprocess to combine_postprocess of one forward pass.
        self.dispatched: Dispatched | None = None

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Exchange the row counts and order the rows to send by destination rank.

        Args:
            hidden_states: ``(..., D)``.
            routing_map: bool ``(T, P)``.
            probs: ``(T, P)``, at least 0 where routed.

        Returns:
            Rows to send ``(R, D)`` and their probabilities ``(R, L)``.
        """
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens_P = routing_map.sum(dim=0)
        if self.ep_size == 1:  # nothing is sent: every token is a row, also one without experts
            counts = RowCounts(tokens_P.new_full((1,), len(hidden_TD)), tokens_P, self.groups)
            self.dispatched = Dispatched(hidden_states.shape, counts, to_ranks=None)
            return hidden_TD, torch.where(routing_map, probs, _NOT_ROUTED)
        to_rank_TN, rows_N = destinations(routing_map, self.ep_size), tokens_P
        if self.num_local_experts > 1:
            rows_N = to_rank_TN.sum(dim=0)
            probs = torch.where(routing_map, probs, _NOT_ROUTED)
        counts = RowCounts(rows_N, tokens_P, self.groups)
        probs_TNL = probs.view(len(probs), self.ep_size, self.num_local_experts)
        to_ranks, rows_XD, probs_XL = self._copies(
            to_rank_TN,
            hidden_TD,
            probs_TNL,
            lambda: sum(counts.splits.input_splits),
            one_expert_each=self.num_local_experts == 1,
        )
        self.dispatched = Dispatched(hidden_states.shape, counts, to_ranks)
        return rows_XD, probs_XL

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows and probabilities to their ranks."""
        if self.ep_size == 1:
            return hidden_states, probs
        splits = self._state().counts.splits
        received_RD = all_to_all(
            self.ep_group, hidden_states, splits.output_splits, splits.input_splits
        )
        probs_RL = all_to_all(self.ep_group, probs, splits.output_splits, splits.input_splits)
        return received_RD, probs_RL

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Copy received rows to the local experts.

        Returns:
            Rows sorted by expert ``(X, D)``, rows per expert int64 ``(L,)`` on the CPU, and the
            probability of each row ``(X,)``.
        """
        state = self._state()
        if self.tp_size > 1:
            hidden_states = self._gather(hidden_states, state.counts.splits)
            probs = self._gather(probs, state.counts.splits)
        if self._takes_all_rows:
            return hidden_states, state.counts.splits.tokens_per_expert, probs.squeeze(1)
        state.to_experts, rows_XD, probs_X = self._copies(
            probs != _NOT_ROUTED,  # NaN counts as routed, as it did in the row counts
            hidden_states,
            probs,
            lambda: int(state.counts.splits.tokens_per_expert.sum()),
            one_expert_each=self.ep_size == 1,
        )
        return rows_XD, state.counts.splits.tokens_per_expert, probs_X

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up the outputs of the local experts of every received row: one row to send back."""
        state = self._state()
        output_RD = hidden_states
        if not self._takes_all_rows:
            assert state.to_experts is not None
            output_RD = state.to_experts.unpermute(hidden_states)
        if self.tp_size > 1:
            output_RD = reduce_scatter_to_sequence_parallel_region(
                output_RD, group=self.tp_group, input_split_sizes=state.counts.splits.etp_splits
            )
        return output_RD

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send the rows back to the ranks that they came from."""
        if self.ep_size == 1:
            return hidden_states
        splits = self._state().counts.splits
        return all_to_all(self.ep_group, hidden_states, splits.input_splits, splits.output_splits)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up what came back for every token, in the shape that was dispatched."""
        state = self._state()
        if state.to_ranks is not None:
            hidden_states = state.to_ranks.unpermute(hidden_states)
        return hidden_states.view(state.hidden_shape)

    def _copies(
        self,
        mask_RZ: Tensor,
        rows_RD: Tensor,
        values_RZ: Tensor,
        num_copies: Callable[[], int],
        *,
        one_expert_each: bool,
    ) -> tuple[RowPermutation, Tensor, Tensor]:
        """Copy rows, and a value each, to the destinations in ``mask_RZ``.

        Args:
            num_copies: Number of True elements of the mask; the first call waits for the device.
            one_expert_each: Every destination is one expert of all tokens here.  Routers choose
                top-k experts for every token, so the number of copies is known without waiting.
        """
        max_copies = min(self.config.moe_router_topk, mask_RZ.shape[1])
        num = len(mask_RZ) * max_copies if one_expert_each else num_copies()
        permutation = RowPermutation.from_mask(mask_RZ, num, max_copies)
        rows_XD = permutation.permute(rows_RD)
        if num_copies() != num:  # not every token has top-k experts: again, with the right number
            permutation = RowPermutation.from_mask(mask_RZ, num_copies(), max_copies)
            rows_XD = permutation.permute(rows_RD)
        return permutation, rows_XD, permutation.values(values_RZ)

    @property
    def _takes_all_rows(self) -> bool:
        """Whether the only local expert is the reason why any row was sent to this rank."""
        return self.num_local_experts == 1 and self.ep_size > 1

    def _state(self) -> Dispatched:
        assert self.dispatched is not None, "dispatch_preprocess comes first"
        return self.dispatched

    def _gather(self, rows: Tensor, splits: DispatchSplits) -> Tensor:
        return gather_from_sequence_parallel_region(
            rows, group=self.tp_group, output_split_sizes=splits.etp_splits
        )
