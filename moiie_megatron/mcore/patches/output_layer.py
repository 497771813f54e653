"""The output layer on a sequence that has been gathered before it."""

from __future__ import annotations

from typing import Any, Final

from moiie_megatron.mcore.patches.patch import Patch


def expect_gathered_input(output_layer: Any) -> None:
    """Let a built ``ColumnParallelLinear`` take the whole sequence instead of this rank's part.

    Its gradient is then summed over the tensor-parallel ranks instead of scattered to them.
    """
    output_layer.sequence_parallel = False
    output_layer.allreduce_dgrad = True


PATCHES: Final = (
    Patch(
        name="output layer",
        targets=("megatron.core.tensor_parallel.layers.ColumnParallelLinear",),
        reason="Logits are computed for labelled tokens alone.  Under sequence parallelism the "
        "sequence has to be gathered before they are selected, but the layer gathers by itself "
        "and cannot be built without that: Megatron passes it the configuration of the decoder.",
    ),
)
