"""The modality routers: which experts each token goes to, and with which weights.

No communication except inside the balance loss.

Three tokens and the experts V S S T (vision, shared, shared, text), top-2:

    scores_TE      V     S     S     T        probs_TE  V     S     S     T
    a  image      1.0   0.0   2.0  -inf                0.27   .   0.73   .
    b  text      -inf   0.0   1.0   0.5                 .     .   0.62  0.38
    c  padding   -inf   3.0   0.0   3.0                 .    0.5   .    0.5

Image tokens are scored by the vision gate, all others by the text gate; an expert that the gate
does not score gets -inf.  Padding is routed like text but counts in no loss.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import IMAGE, PADDING
from moiie_megatron.moe.losses import Balance, balance_losses, routing_sums, z_losses
from moiie_megatron.moe.reference_aux_loss import PooledLoads
from moiie_megatron.moe.router_init import fresh_gate
from moiie_megatron.routing_stats.load_stats import LoadStats


@dataclass(frozen=True)
class RouterSettings:
    """Settings that the routers of all layers share.

    Attributes:
        layout: Which experts exist and who may use them.
        aux_loss_coeffs: Weight of each router's balance loss **in one layer**, by router name:
            alpha divided by the number of MoE layers, because losses of layers add up while the
            reference's alpha weighs their mean (alpha itself for the pooled form).
        init_std: Standard deviation of fresh router weights.
        seed: Seed of the run, which fresh router weights depend on.
        z_loss_coeff: Weight of each router's z-loss in one layer, divided in the same way.
    """

    layout: ExpertLayout
    aux_loss_coeffs: dict[str, float]
    init_std: float
    seed: int = 0
    z_loss_coeff: float = 0.0


class ModalityRouter(MegatronModule):
    """One linear gate per modality over that modality's experts, without bias (paper, sec. 3).

    One softmax and one top-k over the joint expert ids serve every modality: static shapes, no
    index selection, no host sync.  Replaces Megatron's ``TopKRouter``.

    Args:
        config: Megatron's configuration of the language model.
        pg_collection: Megatron's process groups.
        settings: What all routers share.
        device: Where the weights live.
        pooled_loads: For the reference's pooled balance loss; None for the loss of each layer.
        is_mtp_layer: Passed from Megatron-Core 0.17 on; multi-token prediction is not supported.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        settings: RouterSettings,
        *,
        device: torch.device,
        pooled_loads: PooledLoads | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.settings = settings
        self.layout = settings.layout
        self.pooled_loads = pooled_loads
        self.layer_number: int | None = None
        self.records_in_eval = False  # see recording()
        # Ranks that hold other parts of the same micro-batch's tokens.
        self.token_group = pg_collection.tp_cp if config.sequence_parallel else None
        routers = self.layout.routers
        widths = [len(self.layout.allowed(name)) for name in routers]
        self.gates = torch.nn.ParameterDict()
        for name, width in zip(routers, widths, strict=True):
            shape = (width, config.hidden_size)
            weight = torch.empty(shape, dtype=config.params_dtype, device=device)
            self.gates[name] = torch.nn.Parameter(weight)
            # Under sequence parallelism each rank holds part of the gradient: Megatron sums it.
            self.gates[name].sequence_parallel = config.sequence_parallel
        coeffs = [settings.aux_loss_coeffs[name] for name in routers]
        for buffer, values in (("num_experts_G", widths), ("coeffs_G", coeffs)):
            tensor = torch.tensor(values, dtype=torch.float32, device=device)
            self.register_buffer(buffer, tensor, persistent=False)
        self.stats = LoadStats(len(routers), self.layout.num_experts, device)
        self.reset_parameters()

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number of the layer, from 1, and draw its weights.

        Megatron's ``TransformerLayer`` calls this while it is built.
        """
        self.layer_number = layer_number
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights, see ``moe/router_init.py``."""
        for index, gate in enumerate(self.gates.values()):
            gate.copy_(
                fresh_gate(
                    gate.shape,
                    seed=self.settings.seed,
                    layer_number=self.layer_number or 0,
                    router=index,
                    std=self.settings.init_std,
                )
            )

    def forward(self, hidden_states: Tensor, token_types: Tensor) -> tuple[Tensor, Tensor]:
        """Score every token and choose its experts.

        Args:
            hidden_states: ``(s, b, h)``.
            token_types: int8 ``(s, b)``, see ``layout/token_types.py``.

        Returns:
            probs_TE: fp32, the renormalised probabilities of the chosen experts, 0 elsewhere.
            routing_map_TE: bool, the chosen experts.
        """
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        types_T = token_types.reshape(-1)
        scores_TE = self.scores(hidden_TD, types_T)
        # Top-k.
        ids_TK = torch.topk(scores_TE.detach(), self.layout.top_k, dim=-1).indices
        routing_map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        # Renormalise: the softmax over all experts, divided by its sum over the chosen ones, is
        # the softmax over the chosen ones.
        chosen_TE = torch.where(routing_map_TE, scores_TE, float("-inf"))
        probs_TE = torch.softmax(chosen_TE, dim=-1)
        if self.training:
            probs_TE = self._attach_losses(probs_TE, scores_TE, routing_map_TE, types_T)
        elif self.records_in_eval:
            self._count(torch.softmax(scores_TE, dim=-1), routing_map_TE, types_T)
        return probs_TE, routing_map_TE

    def scores(self, hidden_TD: Tensor, types_T: Tensor) -> Tensor:
        """Joint scores fp32 ``(T, E)``: those of each token's own gate, -inf at other experts."""
        # Gate: all gates score all tokens in one product, they are tiny.
        weight_WD = torch.cat(list(self.gates.values()))
        dtype = torch.float32 if self.config.moe_router_dtype == "fp32" else hidden_TD.dtype
        scores_TW = router_gating_linear(hidden_TD, weight_WD, None, dtype).float()
        if self.layout.routers == ("joint",):
            return scores_TW
        # Mask: -inf at the experts that a gate does not score.
        padded_TE = {}
        scores_by_gate = scores_TW.split([len(gate) for gate in self.gates.values()], dim=1)
        for name, scores in zip(self.layout.routers, scores_by_gate, strict=True):
            ids = self.layout.allowed(name)
            edges = (ids.start, self.layout.num_experts - ids.stop)
            padded_TE[name] = F.pad(scores, edges, value=float("-inf"))
        # Score: every token by the gate of its modality.
        is_image_T1 = (types_T == IMAGE).unsqueeze(1)
        return torch.where(is_image_T1, padded_TE["vision"], padded_TE["text"])

    def masks(self, types_T: Tensor) -> Tensor:
        """Tokens that each router scores, without padding: bool ``(T, G)``."""
        if self.layout.routers == ("joint",):
            return (types_T != PADDING).unsqueeze(1)
        return modality_masks(types_T)

    @property
    def is_counting(self) -> bool:
        """Whether the current pass counts in ``stats`` and attaches losses.

        In training that is one pass per micro-batch, also where the layer is recomputed.
        """
        if not self.training:
            return self.records_in_eval
        # A recomputed layer runs twice: first without gradients, then, replayed in backward, with
        # them.  Without recomputation its only pass has gradients.
        return torch.is_grad_enabled()

    def _attach_losses(
        self,
        probs_TE: Tensor,
        scores_TE: Tensor,
        routing_map_TE: Tensor,
        types_T: Tensor,
    ) -> Tensor:
        """Count the load and attach the losses to ``probs_TE``.

        Megatron scales them together with the main loss and adds their gradient in backward.
        """
        settings, masks_TG = self.settings, self.masks(types_T)
        all_probs_TE = torch.softmax(scores_TE, dim=-1)
        balance = balance_losses(
            all_probs_TE, routing_map_TE, masks_TG, self.num_experts_G, self.token_group
        )
        if self.pooled_loads is not None:
            # Also in the first pass of a recomputed layer: backward starts at the last layer and
            # needs the loads of all.
            self.pooled_loads.update(self._layer, balance)
        if not self.is_counting:
            return probs_TE
        loss_G, logged_G = self._balance_loss(balance)
        total = torch.dot(self.coeffs_G, loss_G)
        z_G = torch.zeros_like(logged_G)
        if settings.z_loss_coeff:
            z_G = z_losses(scores_TE, masks_TG, balance.all_tokens_G)
            total = total + settings.z_loss_coeff * z_G.sum()
        ranks = 1 if self.token_group is None else self.token_group.size()
        self.stats.add_losses(logged_G.detach(), z_G.detach(), balance.all_tokens_G.detach(), ranks)
        if self.layout.routers == ("joint",):  # one router and loss, but a count per modality
            self._count(all_probs_TE, routing_map_TE, types_T)
        else:
            self.stats.add_tokens(balance.tokens_G, balance.load_GE, balance.prob_GE)
        return MoEAuxLossAutoScaler.apply(probs_TE, total)

    def _balance_loss(self, balance: Balance) -> tuple[Tensor, Tensor]:
        """The loss to differentiate and the value to log, by router."""
        loads = self.pooled_loads
        if loads is None:
            return balance.loss_G, balance.loss_G
        loss_G = loads.loss_G(balance.prob_GE, self.num_experts_G)
        if not loads.is_last(self._layer):
            return loss_G, torch.zeros_like(loss_G)
        # The log takes the mean over layers: the last one reports for all.
        return loss_G, loads.value_G(self.num_experts_G) * len(loads.layers)

    @torch.no_grad()
    def _count(self, all_probs_TE: Tensor, routing_map_TE: Tensor, types_T: Tensor) -> None:
        masks_TM = modality_masks(types_T)
        self.stats.add_tokens(*routing_sums(all_probs_TE, routing_map_TE, masks_TM))

    @property
    def _layer(self) -> int:
        """Number of the layer, from 0."""
        assert self.layer_number is not None
        return self.layer_number - 1


@contextmanager
def recording(model: torch.nn.Module) -> Iterator[None]:
    """Let all routers of a model count in ``stats`` in evaluation mode too, within the block."""
    routers = [module for module in model.modules() if isinstance(module, ModalityRouter)]
    for router in routers:
        router.records_in_eval = True
    try:
        yield
    finally:
        for router in routers:
            router.records_in_eval = False


def modality_masks(types_T: Tensor) -> Tensor:
    """Image tokens and text tokens, without padding: bool ``(T, M)``."""
    is_image_T = types_T == IMAGE
    return torch.stack([is_image_T, (types_T != PADDING) & ~is_image_T], dim=1)
