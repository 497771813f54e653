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
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import IMAGE, MODALITIES, TEXT
from moiie_megatron.moe.choose_experts import Choice, Summation, choose_experts
from moiie_megatron.moe.losses import BalanceLoss, z_losses
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
        self.gates = torch.nn.ParameterDict()
        for name in routers:
            shape = (len(self.layout.allowed(name)), config.hidden_size)
            weight = torch.empty(shape, dtype=config.params_dtype, device=device)
            self.gates[name] = torch.nn.Parameter(weight)
            # Under sequence parallelism each rank holds part of the gradient: Megatron sums it.
            self.gates[name].sequence_parallel = config.sequence_parallel
        coeffs = [settings.aux_loss_coeffs[name] for name in routers]
        widths = [len(self.layout.allowed(name)) for name in routers]
        self.balance_loss = BalanceLoss(widths, self.layout.top_k, device)
        ranks = 1 if self.token_group is None else self.token_group.size()
        self.stats = LoadStats(
            len(routers), self.layout, device, self._measure, ranks, pg_collection.ep.rank()
        )
        for buffer, constant in self._constants(coeffs).items():
            self.register_buffer(buffer, constant.to(device), persistent=False)
        self.reset_parameters()

    def _constants(self, coeffs: list[float]) -> dict[str, Tensor]:
        """Tensors that forward and backward need on the device."""
        config, layout, no = self.config, self.layout, float("-inf")
        scores_dtype = torch.float32 if config.moe_router_dtype == "fp32" else config.params_dtype
        bias_W = [0.0] * (layout.num_vision + layout.num_shared) + [no] * layout.num_text
        bias_W += [no] * layout.num_vision + [0.0] * (layout.num_shared + layout.num_text)
        edges = {"text": layout.num_text, "vision": layout.num_vision}
        zeros = {
            f"unscored_{name}_ED": torch.zeros(n, config.hidden_size, dtype=config.params_dtype)
            for name, n in edges.items()
        }
        return zeros | {
            "bias_W": torch.tensor(bias_W, dtype=scores_dtype),
            "coeffs_G": torch.tensor(coeffs),
            "minus_infinity": torch.tensor(no),
            "types_M1": torch.tensor([[IMAGE], [TEXT]], dtype=torch.int8),
        }

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
        choice = self.choose(
            hidden_states.reshape(-1, hidden_states.shape[-1]), token_types.reshape(-1)
        )
        return choice.probs_TE, choice.routing_map_TE

    def choose(self, hidden_TD: Tensor, types_T: Tensor) -> Choice:
        """As ``forward``, with the scores.  Counts the choices and attaches the losses."""
        masks_MT = self.masks(types_T)
        choice = choose_experts(
            self._scores(hidden_TD),
            masks_MT,
            self.layout.top_k,
            self.minus_infinity,
            self._summation(),
        )
        if choice.sums is None:
            return choice
        if self.pooled_loads is not None and self.training:
            # Also in the first pass of a recomputed layer: backward starts at the last layer and
            # needs the loads of all.
            self.pooled_loads.update(self._layer, choice.sums)
        if not self.is_counting:
            return choice
        self.stats.add_choices(*choice.sums)
        return self._with_other_losses(choice, masks_MT) if self.training else choice

    def masks(self, types_T: Tensor) -> Tensor:
        """Image tokens and text tokens, without padding: bool ``(M, T)``."""
        return types_T.unsqueeze(0) == self.types_M1

    def _summation(self) -> Summation | None:
        """What is summed in this pass: nothing in evaluation mode, or where it is replayed."""
        if not self.is_counting and (self.pooled_loads is None or not self.training):
            return None
        return Summation(self.token_group, self._loss_gradient if self.training else None)

    def _scores(self, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        """fp32 ``(T, E)`` by gate: -inf at the experts that a gate does not score.

        One product scores all tokens by all gates, which are tiny.
        """
        dtype = torch.float32 if self.config.moe_router_dtype == "fp32" else hidden_TD.dtype
        gates = list(self.gates.values())
        if len(gates) == 1:
            return (router_gating_linear(hidden_TD, gates[0], None, dtype).float(),)
        # Every gate gets a row for every expert, those that it does not score a bias of -inf.
        vision, text = gates
        weight_WD = torch.cat([vision, self.unscored_text_ED, self.unscored_vision_ED, text])
        scores_TW = router_gating_linear(hidden_TD, weight_WD, self.bias_W, dtype).float()
        by_vision_TE, by_text_TE = scores_TW.chunk(2, dim=1)
        return by_vision_TE, by_text_TE

    def _measure(self, prob_ME: Tensor, all_load_ME: Tensor) -> tuple[Tensor, Tensor]:
        """Balance losses to log and numbers of tokens, by router; see ``LoadStats``."""
        tokens_G = self.balance_loss.tokens(all_load_ME)
        if self.pooled_loads is not None:  # the last layer logs for all
            return torch.zeros_like(tokens_G), tokens_G
        return self.balance_loss.value(prob_ME, all_load_ME), tokens_G

    def _loss_gradient(self, all_load_ME: Tensor) -> Tensor:
        """Of all balance losses with respect to the summed probabilities, ``(M, E)``."""
        if self.pooled_loads is not None:
            # Read in the backward pass: in forward, later layers have not run yet.
            all_load_ME = self.pooled_loads.all_load_ME()
        weight_GE = self.coeffs_G.unsqueeze(1) * self.balance_loss.gradient(all_load_ME)
        return weight_GE.expand(len(MODALITIES), -1)

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

    def _with_other_losses(self, choice: Choice, masks_MT: Tensor) -> Choice:
        """Log the pooled balance loss and attach the z-losses; most runs have neither."""
        assert choice.sums is not None
        loads = self.pooled_loads
        if loads is not None and loads.is_last(self._layer):
            # The log takes the mean over layers: the last one reports for all.
            self.stats.add_aux(loads.value_G(self.balance_loss) * len(loads.layers))
        if not self.settings.z_loss_coeff:
            return choice
        masks_GT = self.balance_loss.by_router(masks_MT.float())
        tokens_G = self.balance_loss.tokens(choice.sums.all_load_ME)
        z_G = z_losses(choice.scores_TE, masks_GT, tokens_G)
        self.stats.add_z(z_G.detach())
        total = self.settings.z_loss_coeff * z_G.sum()
        return choice._replace(probs_TE=MoEAuxLossAutoScaler.apply(choice.probs_TE, total))

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
