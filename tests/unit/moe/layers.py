"""A small MoIIE layer on one process, and experts that are easy to calculate by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.layer import MoIIELayer, moiie_module
from moiie_megatron.moe.router import ModalityRouter, RouterSettings

LAYOUT = ExpertLayout.from_variant("moiie")
HIDDEN, TOKENS = 32, 50  # of the router below


def config(hidden: int = 3, **changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": hidden,
        "num_attention_heads": 1,
        "ffn_hidden_size": 8,
        "moe_ffn_hidden_size": 8,
        "num_moe_experts": LAYOUT.num_experts,
        "moe_router_topk": LAYOUT.top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(values | changes))


def build_layer(context: ParallelContext, hidden: int = 3, **options: Any) -> MoIIELayer:
    """A layer with the number 1.

    Args:
        options: For ``moiie_module``.
    """
    settings = RouterSettings(LAYOUT, {"vision": 0.0, "text": 0.0}, init_std=0.5)
    spec = moiie_module(settings, context.groups, torch.device("cpu"), **options)
    layer = build_module(spec, config=config(hidden))
    layer.set_layer_number(1)
    return layer


class NoExperts(torch.nn.Module):
    """Passes rows on, so that only what is around the experts is counted."""

    def forward(self, rows: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        return rows, None


class TimesFactor(torch.nn.Module):
    """Experts that multiply a row with a number of their own and with its probability."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = torch.tensor(factors)

    def forward(self, rows: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        factors = self.factors.repeat_interleave(counts)
        return rows * (factors * probs).unsqueeze(1), None


def router(
    context: ParallelContext,
    *,
    alpha: float = 0.0,
    z_loss: float = 0.0,
    dtype: torch.dtype = torch.float32,
    router_dtype: str | None = "fp32",
) -> ModalityRouter:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_router_dtype=router_dtype,
        params_dtype=dtype,
        use_cpu_initialization=True,
    )
    coeffs = {"vision": alpha, "text": alpha}
    settings = RouterSettings(LAYOUT, coeffs, init_std=0.5, z_loss_coeff=z_loss)
    return ModalityRouter(config, context.groups, settings, device=torch.device("cpu"))


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states ``(s, 1, h)`` and types ``(s, 1)`` of every kind."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(dtype)
    kinds = torch.tensor([TEXT, IMAGE, PADDING], dtype=torch.int8)
    return hidden, kinds[torch.randint(0, 3, (TOKENS, 1), generator=generator)]
