"""All patches of Megatron-Core and torch, and all private names that the project uses."""

from __future__ import annotations

from typing import Final

from moiie_megatron.mcore.patches import (
    adamw,
    bucket_order,
    cpu_devices,
    cpu_gloo,
    cpu_torch,
    dist_checkpointing,
    dist_pickles,
    moe_utils,
    output_layer,
    private_names,
    recompute,
    warning_filters,
)
from moiie_megatron.mcore.patches.patch import Patch

PATCHES: Final[tuple[Patch, ...]] = (
    *cpu_torch.PATCHES,
    *cpu_devices.PATCHES,
    *cpu_gloo.PATCHES,
    *moe_utils.PATCHES,
    *output_layer.PATCHES,
    *recompute.PATCHES,
    *adamw.PATCHES,
    *bucket_order.PATCHES,
    *dist_checkpointing.PATCHES,
    *dist_pickles.PATCHES,
    *warning_filters.PATCHES,
    *private_names.PATCHES,
)
