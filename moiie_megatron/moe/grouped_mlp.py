"""The experts of one rank: two weights with a leading axis of experts.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.moe.expert_ffn import expert_ffn


class GroupedExperts(MegatronModule):
    """Gated FFN experts: ``y = p * fc2(act(gate(x)) * up(x))``, on CPU and GPU.

    Replaces Megatron's ``TEGroupedMLP`` and ``SequentialMLP`` and writes the same checkpoint:
    ``experts.linear_fc1.weight`` and ``experts.linear_fc2.weight`` with a leading axis of
    experts.  An expert without rows gets a zero gradient, so every rank takes part in every
    reduction.

    Args:
        num_local_experts: L.
        config: Megatron's configuration of the language model.
        pg_collection: Megatron's process groups.
        device: Where the weights live.
        name: Passed from Megatron-Core 0.18 on, for settings by module name; not used.

    Attributes:
        weight_fc1: ``(L, 2 F, D)``, gate in the first half, up in the second.
        weight_fc2: ``(L, D, F)``.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        device: torch.device,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.gated_linear_unit and not config.add_bias_linear
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        ffn = config.moe_ffn_hidden_size // self.tp_group.size()

        def weight(out_features: int, in_features: int, partition_axis: int) -> torch.nn.Parameter:
            shape = (num_local_experts, out_features, in_features)
            tensor = torch.empty(shape, dtype=config.params_dtype, device=device)
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                torch.nn.init.normal_(tensor, std=config.init_method_std)
            parameter = torch.nn.Parameter(tensor)
            set_tensor_model_parallel_attributes(parameter, True, partition_axis, 1)
            return parameter

        self.weight_fc1 = weight(2 * ffn, config.hidden_size, 1)
        self.weight_fc2 = weight(config.hidden_size, ffn, 2)

    def forward(
        self, hidden_RD: Tensor, tokens_per_expert: Tensor, probs_R: Tensor
    ) -> tuple[Tensor, None]:
        """Run every row through its expert and multiply it with its routing probability.

        Args:
            hidden_RD: Rows sorted by expert.
            tokens_per_expert: int64 ``(L,)`` on the CPU, adding up to R.
            probs_R: Routing probability of each row.

        Returns:
            ``(R, D)`` and no bias.
        """
        output_RD = expert_ffn(
            hidden_RD,
            probs_R,
            fc1=self.weight_fc1,
            fc2=self.weight_fc2,
            rows_per_expert=tokens_per_expert,
            activation=self.config.activation_func,
        )
        return output_RD, None

    def backward_dw(self) -> None:
        """No weight gradient is delayed; Megatron calls this on every experts module."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Both weights under the names and global shapes of Megatron's other experts modules."""
        # Tensor-parallel ranks hold different parts: only data-parallel ranks are replicas.
        replica_id = (0, 0, self.dp_group.rank())
        return {
            f"{prefix}weight_fc1": ShardedTensorFactory(
                f"{prefix}experts.linear_fc1.weight",
                self.weight_fc1,
                lambda key, t, replica, _: self._build(key, t, replica, sharded_offsets, 1, 2),
                _merge_gated,
                replica_id,
            ),
            f"{prefix}weight_fc2": ShardedTensorFactory(
                f"{prefix}experts.linear_fc2.weight",
                self.weight_fc2,
                lambda key, t, replica, _: self._build(key, t, replica, sharded_offsets, 2, 1),
                _merge_plain,
                replica_id,
            ),
        }

    def _build(
        self,
        key: str,
        tensor: Tensor,
        replica_id: ReplicaId,
        offsets: tuple[Any, ...],
        axis: int,
        parts: int,
    ) -> list[ShardedTensor]:
        """Split ``(L, ...)`` into one shard per expert and per part of ``axis``: gate and up."""
        first = self.ep_group.rank() * self.num_local_experts
        total = self.ep_group.size() * self.num_local_experts
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        before = len(offsets)
        shards = []
        for expert in range(self.num_local_experts):
            for part, piece in enumerate(tensor[expert].chunk(parts, dim=axis - 1)):
                shards.append(
                    ShardedTensor.from_rank_offsets(
                        key,
                        piece.contiguous(),
                        *offsets,
                        (before, first + expert, total),
                        (before + axis, part * tp_size + tp_rank, parts * tp_size),
                        replica_id=replica_id,
                        prepend_axis_num=before + 1,
                    )
                )
        return shards


def _merge_gated(shards: list[Tensor]) -> Tensor:
    experts = [torch.cat(pair) for pair in zip(shards[0::2], shards[1::2], strict=True)]
    return torch.stack(experts)


def _merge_plain(shards: list[Tensor]) -> Tensor:
    return torch.stack(shards)
