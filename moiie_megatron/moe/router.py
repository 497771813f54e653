"""The modality routers: who goes where.  No communication except inside the balance loss.

Shapes: s sequence, b batch, h hidden, T = s * b tokens of this rank, E experts (logical ids),
R routers, W_r experts that router r scores.
"""

from __future__ import annotations

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
    """What the routers of every layer share.

    Args:
        layout: Which experts exist and who may use them.
        aux_loss_coeffs: Weight of each router's balance loss **in one layer**, by router name:
            alpha divided by the number of MoE layers, because losses of layers add up while the
            reference's alpha weighs their mean (alpha itself for the pooled form).
        z_loss_coeff: Weight of each router's z-loss in one layer, shared out in the same way.
        pooled: Loads of all layers, for the reference's pooled balance loss; None for the mean
            of the layers' losses.
        init_std: Standard deviation of fresh router weights.
        seed: Seed of the run, from which fresh router weights follow.
    """

    layout: ExpertLayout
    aux_loss_coeffs: dict[str, float]
    init_std: float
    seed: int = 0
    z_loss_coeff: float = 0.0
    pooled: PooledLoads | None = None


class ModalityRouter(MegatronModule):
    """One linear gate per modality over that modality's experts, without bias (paper, sec. 3).

    All gates score all tokens in one product (they are tiny); forbidden experts get -inf, so
    one softmax and one top-k over the joint ids serve every modality: static shapes, no index
    selection, no host sync.  Stands where Megatron's ``TopKRouter`` does.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        settings: RouterSettings,
    ) -> None:
        super().__init__(config=config)
        self.settings = settings
        self.layout = settings.layout
        self.layer_number: int | None = None
        # Counting belongs to training; who measures a model that is in evaluation mode sets this.
        self.records_in_eval = False
        # Ranks that hold other parts of the same micro-batch's tokens.
        self.token_group = pg_collection.tp_cp if config.sequence_parallel else None
        device = torch.device("cpu") if config.use_cpu_initialization else None
        device = device or torch.device("cuda", torch.cuda.current_device())
        self.gates = torch.nn.ParameterDict()
        for name in self.layout.routers:
            width = len(self.layout.allowed(name))
            shape = (width, config.hidden_size)
            weight = torch.empty(shape, dtype=config.params_dtype, device=device)
            self.gates[name] = torch.nn.Parameter(weight)
            # Under sequence parallelism each rank holds part of the gradient: Megatron sums it.
            self.gates[name].sequence_parallel = config.sequence_parallel
        routers = self.layout.routers
        widths = [float(len(self.layout.allowed(name))) for name in routers]
        coeffs = [settings.aux_loss_coeffs[name] for name in routers]
        for buffer, values in (("candidates_R", widths), ("coeffs_R", coeffs)):
            self.register_buffer(buffer, torch.tensor(values, device=device), persistent=False)
        columns = torch.tensor(_columns(self.layout), device=device)
        self.register_buffer("columns_RE", columns, persistent=False)
        self.stats = LoadStats(len(routers), self.layout.num_experts, device)
        self.reset_parameters()

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron's ``TransformerLayer`` while it is built; counts from 1.

        Draws the weights of that layer: only now is it known which layer this is.
        """
        self.layer_number = layer_number
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights, see ``moe/router_init.py``."""
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
            probs_TE: fp32, the renormalised weights of the chosen experts, 0 elsewhere.
            routing_map_TE: bool, the chosen experts.
        """
        hidden_Th = hidden_states.reshape(-1, hidden_states.shape[-1])
        types_T = token_types.reshape(-1)
        scores_TE = self._scores(hidden_Th, types_T)
        ids_TK = torch.topk(scores_TE.detach(), self.layout.top_k, dim=-1).indices
        routing_map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        # The softmax over the chosen is the softmax over all, renormalised.
        chosen_TE = torch.where(routing_map_TE, scores_TE, float("-inf"))
        probs_TE = torch.softmax(chosen_TE, dim=-1)
        if self.training:
            probs_TE = self._losses(probs_TE, scores_TE, routing_map_TE, types_T)
        elif self.records_in_eval:
            self._count(torch.softmax(scores_TE, dim=-1), routing_map_TE, types_T)
        return probs_TE, routing_map_TE

    @property
    def is_counting(self) -> bool:
        """Whether the current pass is counted: in training the one with gradients, so that a
        recomputed layer (its first pass has none) counts once.
        """
        return torch.is_grad_enabled() if self.training else self.records_in_eval

    def _scores(self, hidden_Th: Tensor, types_T: Tensor) -> Tensor:
        """Joint scores fp32 ``(T, E)``: each token's own router, -inf at forbidden experts."""
        fp32 = self.config.moe_router_dtype == "fp32"
        weight = torch.cat(list(self.gates.values()))
        logits = router_gating_linear(
            hidden_Th, weight, None, torch.float32 if fp32 else hidden_Th.dtype
        ).float()
        if len(self.gates) == 1:
            return logits
        # One more column, -inf, for what a router may not use.
        padded = F.pad(logits, (0, 1), value=float("-inf"))
        columns_TE = self.columns_RE.index_select(0, (types_T != IMAGE).int())
        return padded.gather(1, columns_TE)

    def masks(self, types_T: Tensor) -> Tensor:
        """Tokens that each router scores, without padding: bool ``(T, R)``."""
        if self.layout.routers == ("joint",):
            return (types_T != PADDING).unsqueeze(1)
        return modality_masks(types_T)

    def _losses(
        self,
        probs_TE: Tensor,
        scores_TE: Tensor,
        routing_map_TE: Tensor,
        types_T: Tensor,
    ) -> Tensor:
        """Attach the losses of every router to ``probs_TE`` and count the load, in the pass that
        counts (``is_counting``).
        """
        settings, masks_TR = self.settings, self.masks(types_T)
        all_probs_TE = torch.softmax(scores_TE, dim=-1)
        balance = balance_losses(
            all_probs_TE,
            routing_map_TE,
            masks_TR,
            self.candidates_R,
            self.token_group,
        )
        if settings.pooled is not None:
            assert self.layer_number is not None
            settings.pooled.put(self.layer_number - 1, balance)
        if not self.is_counting:
            return probs_TE
        loss_R, logged_R = self._balance_loss(balance)
        total = torch.dot(self.coeffs_R, loss_R)
        z_R = torch.zeros_like(logged_R)
        if settings.z_loss_coeff:
            z_R = z_losses(scores_TE, masks_TR, balance.all_tokens_R)
            total = total + settings.z_loss_coeff * z_R.sum()
        self.stats.add_losses(logged_R.detach(), z_R.detach())
        if len(self.gates) == 1:  # both modalities share a router and its loss, but not a count
            self._count(all_probs_TE, routing_map_TE, types_T)
        else:
            self.stats.add_tokens(balance.tokens_R, balance.load_RE, balance.prob_RE)
        return MoEAuxLossAutoScaler.apply(probs_TE, total)

    @torch.no_grad()
    def _count(self, all_probs_TE: Tensor, routing_map_TE: Tensor, types_T: Tensor) -> None:
        masks_TM = modality_masks(types_T)
        self.stats.add_tokens(*routing_sums(all_probs_TE, routing_map_TE, masks_TM))

    def _balance_loss(self, balance: Balance) -> tuple[Tensor, Tensor]:
        """The loss to differentiate and the value to log, by router."""
        pooled = self.settings.pooled
        if pooled is None:
            return balance.loss_R, balance.loss_R
        assert self.layer_number is not None
        loss_R = pooled.loss_R(balance.prob_RE, self.candidates_R)
        if not pooled.is_last(self.layer_number - 1):
            return loss_R, torch.zeros_like(loss_R)
        # The log takes the mean over layers: one of them reports for all.
        return loss_R, pooled.value_R(self.candidates_R) * len(pooled.places)


def modality_masks(types_T: Tensor) -> Tensor:
    """Image tokens and text tokens, without padding: bool ``(T, M)``, see ``load_stats.py``."""
    is_image_T = types_T == IMAGE
    return torch.stack([is_image_T, (types_T != PADDING) & ~is_image_T], dim=1)


def _columns(layout: ExpertLayout) -> list[list[int]]:
    """Where the scores of all routers side by side have each router's score of each expert.

    The column after the last one stands for the experts that a router may not use.
    """
    last = sum(len(layout.allowed(name)) for name in layout.routers)
    rows, start = [], 0
    for name in layout.routers:
        allowed = layout.allowed(name)
        rows.append(
            [start + allowed.index(e) if e in allowed else last for e in range(layout.num_experts)]
        )
        start += len(allowed)
    return rows
