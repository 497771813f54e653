"""The MoIIE layer: route, dispatch, compute, combine.

Shape letters: see ``moe/__init__.py``.
"""

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

from moiie_megatron.moe.dispatcher import MoIIETokenDispatcher, rows_by_rank
from moiie_megatron.moe.grouped_mlp import GroupedExperts
from moiie_megatron.moe.reference_aux_loss import PooledLoads
from moiie_megatron.moe.router import ModalityRouter, RouterSettings


class MoIIELayer(MoELayer):
    """Megatron's MoE layer with modality routers; one dispatch serves every modality.

    The forward pass has four steps; (b) and (c) of dispatch and (a) and (b) of combine are the
    dispatcher's methods, which Megatron's ``MoELayer`` methods in parentheses call:

    1. Route.  ``ModalityRouter`` gives each token probabilities over the experts of its modality
       and the map of the chosen ones, ``(T, E)``; the columns are then put into physical order,
       ``(T, P)``.
    2. Dispatch.
       a. ``dispatch_preprocess`` (``preprocess``): exchange row counts, the layer's only host
          sync, and sort the rows to send by destination rank.
       b. ``token_dispatch`` (``dispatch``): all-to-all of rows and probabilities.
       c. ``dispatch_postprocess`` (``routed_experts_compute``): copy received rows to the local
          experts, sorted by expert.
    3. Experts.  ``GroupedExperts`` (``routed_experts_compute``) runs each row through its expert
       and multiplies it with its probability.
    4. Combine.
       a. ``combine_preprocess`` (``routed_experts_compute``): add up the outputs of each received
          row.
       b. ``token_combine`` (``combine``): all-to-all back.
       c. ``combine_postprocess`` (``postprocess``): add up what came back for each token.

    Token types arrive in the argument ``padding_mask``: in Megatron-Core that is the one
    per-token tensor that travels from ``GPTModel.forward`` to every MoE layer, and it is an
    input of the recompute checkpoint, so a replayed layer sees the types of its own
    micro-batch.  Dense layers ignore it.

    Args:
        config: Megatron's configuration of the language model.
        submodules: Router and experts, see ``moiie_module``.
        layer_number: Counts from 1; Megatron's ``TransformerLayer`` sets it later.
        groups: Megatron's process groups.
        dispatcher: Replaces the dispatcher that ``config`` names; None keeps it.
        physical_to_logical: Logical expert by physical index; None for the logical order.
        passed: What the installed version's ``TransformerLayer`` passes besides to ``MoELayer``.
            ``groups`` take the place of a ``pg_collection`` among it, which 0.16 passes only to
            the layer classes that it knows.

    Raises:
        ValueError: Tensor parallelism without sequence parallelism: every rank would compute
            every token.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        *,
        groups: ProcessGroupCollection,
        dispatcher: type[MoETokenDispatcher] | None = None,
        physical_to_logical: tuple[int, ...] | None = None,
        **passed: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **(passed | {"pg_collection": groups}))
        if self.attn_tp_group.size() > 1 and not config.sequence_parallel:
            raise ValueError(
                f"parallel.tensor is {self.attn_tp_group.size()} without sequence parallelism: "
                "set parallel.sequence to true, or every rank computes every token."
            )
        self.physical_to_logical = physical_to_logical
        if physical_to_logical is not None:
            logical_P = torch.tensor(physical_to_logical)
            self.register_buffer("logical_P", logical_P, persistent=False)
        self.dispatcher_kind = "moiie" if dispatcher else config.moe_token_dispatcher_type
        if dispatcher is not None:
            self.token_dispatcher = dispatcher(
                self.num_local_experts, self.local_expert_indices, config, groups
            )
        for parameter in self.experts.parameters():
            # Megatron's mark of parameters that are reduced over the expert data-parallel group.
            # Megatron sets it for EP > 1 only, but with EP = 1 and fewer expert-tensor than
            # tensor ranks that group also covers the tensor-parallel ranks that hold copies of
            # an expert.
            parameter.allreduce = False
            # Without this mark, which newer versions of Transformer Engine leave out, the gradient
            # norm would miss what the tensor-parallel ranks other than the first own.
            parameter.tensor_model_parallel = True

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Apply each token's experts.

        Args:
            hidden_states: ``(s, b, h)``; s is this rank's part under sequence parallelism.
            intermediate_tensors: Megatron's argument for CUDA graphs; not used.
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
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._compute, False, hidden_states, token_types)
        return self._compute(hidden_states, token_types)

    def _compute(self, hidden_states: Tensor, token_types: Tensor) -> tuple[Tensor, None]:
        types_sb = token_types.transpose(0, 1)
        # 1. Route.
        probs_TE, routing_map_TE = self.router(hidden_states, types_sb)
        probs_TP, routing_map_TP = self._physical(probs_TE), self._physical(routing_map_TE)
        if self.ep_group.size() > 1 and self.router.is_counting:
            self._count_rows(routing_map_TP, types_sb.reshape(-1))
        # 2. Dispatch.
        rows_RD, probs_RL = self.preprocess(hidden_states, probs_TP, routing_map_TP)
        rows_RD, probs_RL = self.dispatch(rows_RD, probs_RL)
        # 2c, 3, 4a.
        output_RD, _ = self.routed_experts_compute(rows_RD, probs_RL)
        # 4. Combine.
        return self.postprocess(self.combine(output_RD), None), None

    def _physical(self, tensor_TE: Tensor) -> Tensor:
        """Columns from logical to physical order: ``(T, E)`` to ``(T, P)``."""
        if self.physical_to_logical is None:
            return tensor_TE
        return tensor_TE.index_select(1, self.logical_P)

    def _count_rows(self, routing_map_TP: Tensor, types_T: Tensor) -> None:
        rows_TN = rows_by_rank(routing_map_TP, self.ep_group.size(), self.dispatcher_kind)
        self.router.stats.add_rows(self.router.masks(types_T), rows_TN)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The checkpoint view: experts appear under their logical ids, whatever their rank."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.physical_to_logical is None:
            return state
        rename = partial(
            _to_logical,
            physical_to_logical=self.physical_to_logical,
            expert_axis=len(sharded_offsets),
        )
        for name, entry in state.items():
            if ".experts." not in entry.key:
                continue
            if isinstance(entry, ShardedTensorFactory):
                state[name] = replace(entry, build_fn=partial(_renamed, entry.build_fn, rename))
            else:
                state[name] = rename(entry)
        return state


def _to_logical(shard: Any, physical_to_logical: tuple[int, ...], expert_axis: int) -> Any:
    """The shard of an expert by physical index, as the shard of the same expert by logical id."""
    offset = list(shard.global_offset)
    offset[expert_axis] = physical_to_logical[offset[expert_axis]]
    return replace(shard, global_offset=tuple(offset))


def _renamed(build: Callable[..., Any], rename: Callable[[Any], Any], *arguments: Any) -> Any:
    return [rename(shard) for shard in build(*arguments)]


def moiie_module(
    settings: RouterSettings,
    groups: ProcessGroupCollection,
    device: torch.device,
    *,
    dispatcher: type[MoETokenDispatcher] | None = MoIIETokenDispatcher,
    physical_to_logical: tuple[int, ...] | None = None,
    experts: Any = None,
    pooled_loads: PooledLoads | None = None,
) -> ModuleSpec:
    """The MoIIE layer as the ``mlp`` of a Megatron layer specification.

    Args:
        settings: Settings of the routers of all layers.
        groups: Megatron's process groups.
        device: Where the weights live.
        dispatcher: The token dispatcher; None for the one that the Megatron configuration names.
        physical_to_logical: Logical expert by physical index (``Placement.order`` in
            ``layout/placement.py``); default the logical order.
        experts: The specification of the experts module; default ``GroupedExperts``.
        pooled_loads: For the reference's pooled balance loss, one object for all layers.
    """
    submodules = MoESubmodules(
        experts=experts or ModuleSpec(module=GroupedExperts, params={"device": device}),
        router=partial(ModalityRouter, settings=settings, device=device, pooled_loads=pooled_loads),
    )
    return ModuleSpec(
        module=MoIIELayer,
        params={
            "groups": groups,
            "dispatcher": dispatcher,
            "physical_to_logical": physical_to_logical,
        },
        submodules=submodules,
        metainfo={"fuse_pre_mlp_layernorm": False},
    )
