"""torch's AdamW inside Megatron-Core's optimizer."""

from __future__ import annotations

from typing import Any, Final

import torch

from moiie_megatron.mcore.patches.patch import Patch


def use_fused_adamw(optimizer: Any) -> None:
    """Let torch's AdamW update a parameter in one pass over memory instead of five.

    The optimizers of Transformer Engine and Apex are fused already and stay as they are.

    Args:
        optimizer: Megatron's optimizer, chained or not.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True


PATCHES: Final = (
    Patch(
        name="fused AdamW",
        targets=("megatron.core.optimizer.get_megatron_optimizer", "torch.optim.AdamW"),
        reason="Where Transformer Engine and Apex are missing, Megatron-Core takes torch's AdamW "
        "with its default, which is the slow one on the CPU, and has no option for it.",
    ),
)
