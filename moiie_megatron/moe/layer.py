"""The MoIIE layer: route, dispatch, compute, combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.moe.dispatcher import rows_by_rank
from moiie_megatron.moe.grouped_mlp import GroupedExperts
from moiie_megatron.moe.router import ModalityRouter, RouterSettings, modality_masks


class MoIIELayer(MoELayer):
    """Megatron's MoE layer with modality routers; one dispatch serves every modality.

    Token types arrive in the argument ``padding_mask``: in Megatron-Core 0.16 that is the one
    per-token tensor that travels from ``GPTModel.forward`` to every MoE layer, and it is an
    input of the recompute checkpoint, so a replayed layer sees the types of its own
    micro-batch.  Dense layers ignore it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        dispatcher: type[MoETokenDispatcher] | None = None,
        order: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection)
        self.order = order
        if order is not None:
            self.register_buffer("order_E", torch.tensor(order), persistent=False)
        self.dispatcher_kind = "moiie" if dispatcher else config.moe_token_dispatcher_type
        if dispatcher is not None:
            self.token_dispatcher = dispatcher(
                self.num_local_experts, self.local_expert_indices, config, pg_collection
            )
        for parameter in self.experts.parameters():
            # Reduced over the expert data-parallel group at every EP degree.  Megatron does so
            # only for EP > 1, but with EP = 1 and fewer expert-tensor than tensor ranks that
            # group also covers the tensor-parallel ranks that hold copies of an expert.
            parameter.allreduce = False

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Apply each token's experts.

        Args:
            hidden_states: ``(s, b, h)``; s is this rank's part under sequence parallelism.
            padding_mask: Token types, int8 ``(b, s)``.

        Returns:
            ``(s, b, h)`` and no bias.

        Raises:
            ValueError: No token types, or types of another shape: there is no safe default
                (all-text would train the wrong experts in silence).
        """
        token_types = padding_mask
        s, b, _ = hidden_states.shape
        if token_types is None or token_types.shape != (b, s):
            got = "none" if token_types is None else f"shape {tuple(token_types.shape)}"
            raise ValueError(
                f"MoIIE layer {self.layer_number} got {got} as token types for hidden states of "
                f"sequence {s} and batch {b}: pass int8 token types ({b}, {s}) with the batch."
            )
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError(
                f"parallel.tensor is {self.attn_tp_group.size()} without sequence parallelism: "
                "set parallel.sequence to true, every rank would compute every token."
            )
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._compute, False, hidden_states, token_types)
        return self._compute(hidden_states, token_types)

    def _compute(self, hidden_states: Tensor, token_types: Tensor) -> tuple[Tensor, None]:
        probs, routing_map = self.router(hidden_states, token_types.transpose(0, 1))
        if self.order is not None:  # from logical ids to places
            probs = probs.index_select(1, self.order_E)
            routing_map = routing_map.index_select(1, self.order_E)
        if self.ep_group.size() > 1 and self.router.is_counting:
            self._count_rows(routing_map, token_types)
        hidden_states, probs = self.preprocess(hidden_states, probs, routing_map)
        dispatched, probs = self.dispatch(hidden_states, probs)
        output, _ = self.routed_experts_compute(dispatched, probs)
        return self.postprocess(self.combine(output), None), None

    def _count_rows(self, routing_map: Tensor, token_types: Tensor) -> None:
        rows_TN = rows_by_rank(routing_map, self.ep_group.size(), self.dispatcher_kind)
        masks_TM = modality_masks(token_types.transpose(0, 1).reshape(-1))
        self.router.stats.add_rows(masks_TM, rows_TN, self.ep_group.rank())

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The checkpoint view; experts appear under their logical ids whatever their place."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.order is None:
            return state
        rename = partial(_to_logical, order=self.order, axis=len(sharded_offsets))
        for name, entry in state.items():
            if ".experts." not in entry.key:
                continue
            if isinstance(entry, ShardedTensorFactory):
                state[name] = replace(entry, build_fn=partial(_renamed, entry.build_fn, rename))
            else:
                state[name] = rename(entry)
        return state


def _to_logical(shard: Any, order: tuple[int, ...], axis: int) -> Any:
    """A shard of the expert at a place as the shard of the logical expert that lives there."""
    offset = list(shard.global_offset)
    offset[axis] = order[offset[axis]]
    return replace(shard, global_offset=tuple(offset))


def _renamed(build: Callable[..., Any], rename: Callable[[Any], Any], *arguments: Any) -> Any:
    return [rename(shard) for shard in build(*arguments)]


def moiie_module(
    settings: RouterSettings,
    groups: ProcessGroupCollection,
    dispatcher: type[MoETokenDispatcher] | None = None,
    order: tuple[int, ...] | None = None,
    experts: ModuleSpec | type | None = None,
) -> ModuleSpec:
    """What a layer specification needs to put a MoIIE layer in place of the FFN.

    Args:
        groups: Megatron's process groups; its ``TransformerLayer`` passes them only to layers
            that it knows by class.
        dispatcher: The token dispatcher; default what the Megatron configuration names.
        order: Logical expert by place (``layout/placement.py``); default the logical order.
        experts: The experts module; default ``GroupedExperts``.
    """
    submodules = MoESubmodules(
        experts=experts or GroupedExperts,
        router=partial(ModalityRouter, settings=settings),
    )
    return ModuleSpec(
        module=MoIIELayer,
        params={"pg_collection": groups, "dispatcher": dispatcher, "order": order},
        submodules=submodules,
        metainfo={"fuse_pre_mlp_layernorm": False},
    )
