"""Two gaps of Megatron-Core's MoE utilities, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from megatron.core.transformer.moe import moe_utils

from moiie_megatron.mcore.patches.patch import Patch


def define_te_general_gemm() -> None:
    """Define the name that the router's product asks for, where Megatron has not imported it."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@contextmanager
def router_product_of_torch() -> Iterator[None]:
    """Within the block the router multiplies with torch where it would with Transformer Engine.

    Transformer Engine multiplies fp32 matrices as TF32.  Only for comparisons with the CPU.
    """
    product = getattr(moe_utils, "te_general_gemm", None)
    moe_utils.te_general_gemm = None
    try:
        yield
    finally:
        moe_utils.te_general_gemm = product


def initialize_aux_loss_scale(device: torch.device) -> None:
    """Set the scale of auxiliary losses to a one of the shape that the schedules give it."""
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1, device=device)


PATCHES: Final = (
    Patch(
        name="te_general_gemm",
        targets=("megatron.core.transformer.moe.moe_utils.te_general_gemm",),
        reason="router_gating_linear reads it, and without Transformer Engine it is an undefined "
        "name (NameError).",
        creates=True,
        versions=("0.16",),
    ),
    Patch(
        name="aux loss scale",
        targets=(
            "megatron.core.transformer.moe.moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale",
        ),
        reason="The class keeps the shape that it gets first.  A backward pass before the first "
        "schedule leaves a scalar, into which the (1,) of the schedules cannot be copied.",
    ),
)
