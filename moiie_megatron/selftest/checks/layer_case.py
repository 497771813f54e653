"""One MoE layer on given tokens, its peers, and the matrix products alone: what is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.dispatcher import MoIIETokenDispatcher
from moiie_megatron.moe.layer import MoIIELayer, moiie_module
from moiie_megatron.moe.router import RouterSettings

LAYOUT = ExpertLayout.from_variant("moiie")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One shape: hidden states ``(s, 1, h)``, token types ``(1, s)`` and the gradient."""

    config: TransformerConfig
    hidden: Tensor
    token_types: Tensor
    gradient: Tensor

    @classmethod
    def make(
        cls,
        hidden: int,
        ffn: int,
        dtype: torch.dtype,
        tokens: int,
        image_fraction: float,
        layout: ExpertLayout = LAYOUT,
        device: torch.device = _CPU,
    ) -> Case:
        """Random tokens of one rank, drawn on the CPU."""
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            moe_ffn_hidden_size=ffn,
            num_attention_heads=8,
            num_moe_experts=layout.num_experts,
            moe_router_topk=layout.top_k,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.001,
            moe_token_dispatcher_type="alltoall",
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=device.type == "cpu",
        )
        generator = torch.Generator().manual_seed(0)
        types = torch.where(
            torch.rand(1, tokens, generator=generator) < image_fraction, IMAGE, TEXT
        )
        shape = (tokens, 1, hidden)
        return cls(
            config,
            torch.randn(shape, generator=generator).to(device, dtype),
            types.to(device, torch.int8),
            torch.randn(shape, generator=generator).to(device, dtype),
        )

    def step(self, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Forward and backward with gradients for the input and all weights."""

        def run() -> None:
            hidden = self.hidden.detach().requires_grad_()
            forward(hidden).backward(self.gradient)

        return run

    def layer_step(self, layer: MoIIELayer) -> Callable[[], None]:
        """Forward and backward of a MoIIE layer."""
        return self.step(lambda hidden: layer(hidden, padding_mask=self.token_types)[0])


def moiie_layer(
    case: Case,
    context: ParallelContext,
    *,
    layout: ExpertLayout = LAYOUT,
    experts: ModuleSpec | None = None,
    **options: Any,
) -> MoIIELayer:
    """A layer of this project.

    Args:
        experts: The experts module; default ``GroupedExperts``.
        options: ``dispatcher`` and ``physical_to_logical`` of ``moiie_module``.
    """
    settings = RouterSettings(layout, {"vision": 0.001, "text": 0.001}, init_std=0.02)
    options.setdefault("dispatcher", MoIIETokenDispatcher)
    spec = moiie_module(
        settings, context.groups, context.device.torch_device, experts=experts, **options
    )
    return MoIIELayer(case.config, spec.submodules, layer_number=1, **spec.params)


class GemmLimit(torch.nn.Module):
    """The experts' arithmetic on ``top_k`` rows per token with one dense pair of weights."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        h, f = case.config.hidden_size, case.config.ffn_hidden_size
        dtype, device = case.config.params_dtype, case.hidden.device
        self.up = torch.nn.Linear(h, 2 * f, bias=False, dtype=dtype, device=device)
        self.down = torch.nn.Linear(f, h, bias=False, dtype=dtype, device=device)
        rows = case.hidden.shape[0] * LAYOUT.top_k
        generator = torch.Generator().manual_seed(1)
        rows_RD = torch.randn(rows, h, generator=generator).to(device, dtype)
        self.rows = rows_RD.requires_grad_()
        self.gradient = torch.randn(rows, h, generator=generator).to(device, dtype)

    @property
    def flops(self) -> float:
        """Operations of a step: three products for each of the three weight matrices."""
        weights = self.up.weight.numel() + self.down.weight.numel()
        return 6.0 * len(self.rows) * weights

    def step(self) -> None:
        """Forward and backward."""
        gate, up = self.up(self.rows).chunk(2, dim=-1)
        self.down(F.silu(gate) * up).backward(self.gradient)
