"""Recomputing activations gives the same numbers, in every mode that Megatron-Core has."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from moiie_megatron.mcore.parallel import ParallelContext
from tests.te.steps import (
    disagreement,
    fused_weight_gradients,
    packed,
    take_step,
    tiny_config,
    with_section,
)

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "uniform": FULL | {"recompute_method": "uniform"},
    "block": FULL
    | {"recompute_method": "block"},  # of the two layers the second, of experts, is not
    "core attention": {"recompute_modules": ["core_attn"]},
    "experts": {"recompute_modules": ["moe"]},
    "activation of experts": {"recompute_modules": ["moe_act"]},
    "norms": {"recompute_modules": ["layernorm"]},
    "dense ffn": {"recompute_modules": ["mlp"]},
    "several": {"recompute_modules": ["core_attn", "moe_act", "layernorm", "mlp"]},
}


class Operations(TorchDispatchMode):
    """Counts torch's operations, forward and backward."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_recompute(te: ParallelContext, mode: str) -> None:
    """The same numbers as without, with more work; packed rows, fused weight gradients."""
    config = with_section(tiny_config(), "data", packing=True)
    records, counts = [], []
    for options in ({}, {"recompute_granularity": "selective"} | RECOMPUTE[mode]):
        changed = config.model_copy(update={"megatron": options})
        with fused_weight_gradients(), Operations() as operations:
            records.append(take_step(changed, te, packed()))
        counts.append(operations.count)
    plain, recomputed = records
    assert disagreement(recomputed, plain) == {}
    assert counts[1] > counts[0]
