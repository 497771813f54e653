"""Experts train the same with and without recompute when nothing before the decoder does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig, ParallelConfig
from moiie_megatron.layout.token_types import TEXT
from moiie_megatron.mcore.parallel import DistEnv, destroy_parallel, init_parallel
from tests.parity.tiny import build, language, run_config

MOE = MoEConfig(num_vision_experts=1, num_shared_experts=2, num_text_experts=1)
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


def gradients(megatron: dict[str, object]) -> dict[str, Tensor]:
    """Of the parameters of a stage that trains the MoE layers alone."""
    context = init_parallel(ParallelConfig(), DistEnv(), device="cpu", seed=1)
    config = run_config(language("llama"), MOE, megatron=megatron)
    model = build(config, context)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp.router." in name or ".mlp.experts." in name)
    torch.manual_seed(3)
    tokens = torch.randint(0, 256, (2, 20))
    model(
        tokens=tokens,
        position_ids=torch.arange(20).repeat(2, 1),
        token_types=torch.full((2, 20), TEXT, dtype=torch.int8),
        labels=tokens.roll(-1, dims=1),
    ).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    destroy_parallel()
    return found


@pytest.mark.parametrize("megatron", [FULL, SELECTIVE], ids=["full", "selective"])
def test_gradients_with_recompute(megatron: dict[str, object]) -> None:
    torch.set_num_threads(1)
    got, expected = gradients(megatron), gradients({})
    assert got.keys() == expected.keys() and len(got) > 5
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert all(
        gradient.any() for name, gradient in got.items() if "fc" in name or "gates.text" in name
    )
