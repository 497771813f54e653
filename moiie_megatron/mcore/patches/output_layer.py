"""The output layer: on a gathered sequence, and without Apex."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from megatron.core.tensor_parallel import layers

from moiie_megatron.mcore.patches.patch import Patch


def expect_gathered_input(output_layer: Any) -> None:
    """Let a built ``ColumnParallelLinear`` take the whole sequence instead of this rank's part.

    Its gradient is then summed over the tensor-parallel ranks instead of scattered to them.
    """
    output_layer.sequence_parallel = False
    output_layer.allreduce_dgrad = True


HAS_APEX_EXTENSION: Final = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@contextmanager
def built_without_apex() -> Iterator[None]:
    """Let Megatron build its own linear layers for a configuration with fused weight gradients.

    Those are then still to be told to go without (``keep_gradient_apart``).
    """
    available = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = available


def keep_gradient_apart(output_layer: Any) -> None:
    """Let a built ``ColumnParallelLinear`` return its weight's gradient like any torch module."""
    output_layer.gradient_accumulation_fusion = False


PATCHES: Final = (
    Patch(
        name="output layer",
        targets=("megatron.core.tensor_parallel.layers.ColumnParallelLinear",),
        reason="Logits are computed for labelled tokens alone.  Under sequence parallelism the "
        "sequence has to be gathered before they are selected, but the layer gathers by itself "
        "and cannot be built without that: Megatron passes it the configuration of the decoder.",
    ),
    Patch(
        name="output layer without Apex",
        targets=("megatron.core.tensor_parallel.layers._grad_accum_fusion_available",),
        reason="Transformer Engine's layers fuse weight gradients without Apex, but the output "
        "layer, always Megatron's own, gets the same configuration and refuses to be built.",
    ),
)
