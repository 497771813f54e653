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

# The probability of a row at an expert that it is not routed to.  Not 0, which a router may give
# to an expert that it has chosen.
_NOT_ROUTED = -1.0


@dataclass(frozen=True)
class DispatchSplits:
    """Row counts of one dispatch, on the host.

    Attributes:
        input_splits: Rows that this rank sends to each expert-parallel rank.
        output_splits: Rows that it receives from each expert-parallel rank.
        etp_splits: Rows that each of its expert-tensor-parallel ranks receives.
        tokens_per_expert: int64 ``(L,)`` on the CPU, rows of each local expert.
    """

    input_splits: list[int]
    output_splits: list[int]
    etp_splits: list[int]
    tokens_per_expert: Tensor


@dataclass
class Dispatched:
    """State that dispatch leaves for combine.

    Attributes:
        hidden_shape: Shape of the hidden states that were dispatched.
        splits: Row counts.
        to_ranks: Copies of tokens to ranks; None with a single expert-parallel rank.
        to_experts: Copies of received rows to local experts; set by ``dispatch_postprocess``.
            None with a single local expert, which takes the received rows as they are.
    """

    hidden_shape: torch.Size
    splits: DispatchSplits
    to_ranks: RowPermutation | None
    to_experts: RowPermutation | None = None


def destinations(routing_map_TP: Tensor, ep_size: int) -> Tensor:
    """The expert-parallel ranks that hold an expert of each token, bool ``(T, N)``."""
    tokens, experts = routing_map_TP.shape
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
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.ep_rank = self.ep_group.rank()
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
        if self.ep_size == 1:  # nothing is sent: every token is a row, also one without experts
            to_rank_TN = torch.ones(len(hidden_TD), 1, dtype=torch.bool, device=hidden_TD.device)
        else:
            to_rank_TN = destinations(routing_map, self.ep_size)
        splits = self._exchange_counts(to_rank_TN, routing_map)
        probs_TP = torch.where(routing_map, probs, _NOT_ROUTED)
        if self.ep_size == 1:
            self.dispatched = Dispatched(hidden_states.shape, splits, to_ranks=None)
            return hidden_TD, probs_TP
        max_ranks = min(self.config.moe_router_topk, self.ep_size)
        to_ranks = RowPermutation.from_mask(to_rank_TN, sum(splits.input_splits), max_ranks)
        self.dispatched = Dispatched(hidden_states.shape, splits, to_ranks)
        # probs_TP cut into one (1, L) block per (token, rank), of which each is sent at most once.
        block_X = to_ranks.row_X * self.ep_size + to_ranks.destination_X
        probs_XL = probs_TP.view(-1, self.num_local_experts).index_select(0, block_X)
        return to_ranks.permute(hidden_TD), probs_XL

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows and probabilities to their ranks."""
        if self.ep_size == 1:
            return hidden_states, probs
        splits = self._state().splits
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
            hidden_states = self._gather(hidden_states, state.splits)
            probs = self._gather(probs, state.splits)
        tokens_per_expert = state.splits.tokens_per_expert
        if self._takes_all_rows:
            return hidden_states, tokens_per_expert, probs.squeeze(1)
        routed_RL = probs != _NOT_ROUTED  # NaN counts as routed, as it did in the row counts
        state.to_experts = RowPermutation.from_mask(
            routed_RL,
            int(tokens_per_expert.sum()),
            min(self.config.moe_router_topk, self.num_local_experts),
        )
        row_X, expert_X = state.to_experts.row_X, state.to_experts.destination_X
        probs_X = probs.reshape(-1).index_select(0, row_X * self.num_local_experts + expert_X)
        return state.to_experts.permute(hidden_states), tokens_per_expert, probs_X

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up the outputs of the local experts of every received row: one row to send back."""
        state = self._state()
        output_RD = hidden_states
        if not self._takes_all_rows:
            assert state.to_experts is not None
            output_RD = state.to_experts.unpermute(hidden_states)
        if self.tp_size > 1:
            output_RD = reduce_scatter_to_sequence_parallel_region(
                output_RD, group=self.tp_group, input_split_sizes=state.splits.etp_splits
            )
        return output_RD

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send the rows back to the ranks that they came from."""
        if self.ep_size == 1:
            return hidden_states
        splits = self._state().splits
        return all_to_all(self.ep_group, hidden_states, splits.input_splits, splits.output_splits)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up what came back for every token, in the shape that was dispatched."""
        state = self._state()
        if state.to_ranks is not None:
            hidden_states = state.to_ranks.unpermute(hidden_states)
        return hidden_states.view(state.hidden_shape)

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

    def _exchange_counts(self, to_rank_TN: Tensor, routing_map_TP: Tensor) -> DispatchSplits:
        """All-gather the row counts of all ranks and copy them to the host."""
        counts = torch.cat([to_rank_TN.sum(dim=0), routing_map_TP.sum(dim=0)])
        if self.ep_size * self.tp_size > 1:
            gathered = counts.new_empty(self.ep_size * self.tp_size * counts.numel())
            torch.distributed.all_gather_into_tensor(gathered, counts, group=self.tp_ep_group)
            counts = gathered
        # Device-to-host sync, the only one of the layer: all_to_all needs its sizes on the host.
        counts = counts.cpu().view(self.ep_size, self.tp_size, -1)
        rows = counts[:, :, : self.ep_size]  # (from rank, from expert-tensor rank, to rank)
        first = self.ep_size + self.ep_rank * self.num_local_experts
        local = counts[:, :, first : first + self.num_local_experts]
        return DispatchSplits(
            input_splits=rows[self.ep_rank, self.tp_rank].tolist(),
            output_splits=rows[:, self.tp_rank, self.ep_rank].tolist(),
            etp_splits=rows[:, :, self.ep_rank].sum(dim=0).tolist(),
            tokens_per_expert=local.sum(dim=(0, 1)),
        )
