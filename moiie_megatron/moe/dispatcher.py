"""The MoIIE token dispatcher: every token travels once to each rank that holds its experts.

Megatron's ``alltoall`` dispatcher sends one row per (token, expert): a token whose two experts
sit on one rank is sent twice.  Here a row goes to a rank once, with the probabilities of all
experts of that rank; the receiver copies it to its experts, adds their outputs up, and sends one
row back.  One dispatch and one combine serve all modalities over the joint expert ids.

Shapes: T tokens of this rank, D hidden, N expert-parallel ranks, E experts in physical order,
n = E / N experts per rank, S rows sent, R rows received (of all expert-tensor ranks), X copies
of received rows, one per (row, local expert).
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

# Stands in the probabilities of a row at experts that the row does not go to.
_NOT_ROUTED = -1.0


@dataclass(frozen=True)
class _Plan:
    """Numbers of one dispatch, on the host: the only thing that is waited for."""

    send: list[int]  # rows to each expert-parallel rank
    receive: list[int]  # rows from each expert-parallel rank
    gather: list[int]  # rows that each expert-tensor rank receives
    tokens_per_expert: Tensor  # int64 (n,) on the CPU


def destinations(routing_map_TE: Tensor, ep_size: int) -> Tensor:
    """Which expert-parallel ranks each token goes to, bool ``(T, N)``."""
    tokens, experts = routing_map_TE.shape
    return routing_map_TE.view(tokens, ep_size, experts // ep_size).any(dim=2)


def rows_by_rank(routing_map_TE: Tensor, ep_size: int, dispatcher: str) -> Tensor:
    """Rows that each token becomes on each expert-parallel rank, ``(T, N)``.

    Args:
        routing_map_TE: Experts in physical order.
        dispatcher: ``moe.dispatcher``: ``moiie`` and ``flex`` send a token once to every rank
            that holds one of its experts, ``alltoall`` once per expert, ``allgather`` once to
            every rank.
    """
    if dispatcher == "allgather":
        return routing_map_TE.new_ones(len(routing_map_TE), ep_size)
    if dispatcher == "alltoall":
        return routing_map_TE.view(len(routing_map_TE), ep_size, -1).sum(dim=2)
    return destinations(routing_map_TE, ep_size)


class MoIIETokenDispatcher(MoETokenDispatcher):
    """Stands where Megatron's ``MoEAlltoAllTokenDispatcher`` does, with the same six methods.

    A token may have any number of experts, also none (it comes back as 0).  Up to two experts
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

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Exchange the row counts and lay out the rows to send, by destination rank.

        Args:
            hidden_states: ``(..., D)``.
            routing_map: bool ``(T, E)``.
            probs: ``(T, E)``, at least 0 where routed.

        Returns:
            Rows ``(S, D)`` and their probabilities ``(S, n)``.
        """
        self.hidden_shape = hidden_states.shape
        hidden_TD = hidden_states.reshape(-1, self.hidden_shape[-1])
        if self.ep_size == 1:  # nothing travels: every token is a row, also one without experts
            sent_TN = torch.ones(len(hidden_TD), 1, dtype=torch.bool, device=hidden_TD.device)
        else:
            sent_TN = destinations(routing_map, self.ep_size)
        self.plan = self._plan(sent_TN, routing_map)
        probs_TE = torch.where(routing_map, probs, _NOT_ROUTED)
        if self.ep_size == 1:
            return hidden_TD, probs_TE
        most = min(self.config.moe_router_topk, self.ep_size)
        self.sent = RowPermutation.from_mask(sent_TN, sum(self.plan.send), most)
        # Each (token, rank) block of probabilities is sent at most once.
        block_S = self.sent.row_X * self.ep_size + self.sent.group_X
        probs_Sn = probs_TE.view(-1, self.num_local_experts).index_select(0, block_S)
        return self.sent.expand(hidden_TD), probs_Sn

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows and probabilities to their ranks."""
        if self.ep_size == 1:
            return hidden_states, probs
        plan = self.plan
        return (
            all_to_all(self.ep_group, hidden_states, plan.receive, plan.send),
            all_to_all(self.ep_group, probs, plan.receive, plan.send),
        )

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Copy received rows to the local experts.

        Returns:
            Rows sorted by expert ``(X, D)``, rows per expert int64 ``(n,)`` on the CPU, and the
            probability of each row ``(X,)``.
        """
        if self.tp_size > 1:
            hidden_states = self._gather(hidden_states)
            probs = self._gather(probs)
        tokens_per_expert = self.plan.tokens_per_expert
        most = min(self.config.moe_router_topk, self.num_local_experts)
        routed = probs != _NOT_ROUTED  # also where a probability is NaN: its row was counted
        self.copies = RowPermutation.from_mask(routed, int(tokens_per_expert.sum()), most)
        place_X = self.copies.row_X * self.num_local_experts + self.copies.group_X
        probs_X = probs.reshape(-1).index_select(0, place_X)
        return self.copies.expand(hidden_states), tokens_per_expert, probs_X

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up the outputs of the local experts of every received row: one row to send back."""
        reduced = self.copies.reduce(hidden_states)
        if self.tp_size > 1:
            reduced = reduce_scatter_to_sequence_parallel_region(
                reduced, group=self.tp_group, input_split_sizes=self.plan.gather
            )
        return reduced

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send the rows back to where they came from."""
        if self.ep_size == 1:
            return hidden_states
        return all_to_all(self.ep_group, hidden_states, self.plan.send, self.plan.receive)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up what came back for every token, in the shape that was dispatched."""
        if self.ep_size > 1:
            hidden_states = self.sent.reduce(hidden_states)
        return hidden_states.view(self.hidden_shape)

    def _gather(self, tensor: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(
            tensor, group=self.tp_group, output_split_sizes=self.plan.gather
        )

    def _plan(self, sent_TN: Tensor, routing_map_TE: Tensor) -> _Plan:
        """All-gather the counts of every rank, then wait for the host copy once."""
        counts = torch.cat([sent_TN.sum(dim=0), routing_map_TE.sum(dim=0)])
        if self.ep_size * self.tp_size > 1:
            gathered = counts.new_empty(self.ep_size * self.tp_size * counts.numel())
            torch.distributed.all_gather_into_tensor(gathered, counts, group=self.tp_ep_group)
            counts = gathered
        counts = counts.cpu().view(self.ep_size, self.tp_size, -1)
        rows = counts[:, :, : self.ep_size]  # (from rank, from tensor rank, to rank)
        first = self.ep_rank * self.num_local_experts + self.ep_size
        experts = counts[:, :, first : first + self.num_local_experts]
        return _Plan(
            send=rows[self.ep_rank, self.tp_rank].tolist(),
            receive=rows[:, self.tp_rank, self.ep_rank].tolist(),
            gather=rows[:, :, self.ep_rank].sum(dim=0).tolist(),
            tokens_per_expert=experts.sum(dim=(0, 1)),
        )
