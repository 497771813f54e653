"""Fused kernels that a run may ask for in its ``megatron`` section."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformer_engine.pytorch import (
    moe_permute_with_probs,
    moe_sort_chunks_by_index_with_probs,
    moe_unpermute,
    parallel_cross_entropy,
)

from moiie_megatron.mcore.config import transformer_config
from moiie_megatron.mcore.parallel import ParallelContext
from tests.te.steps import disagreement, packed, padded, take_step, tiny_config, with_section


def test_cross_entropy() -> None:
    """Tokens without a label have no loss and no gradient."""
    logits = torch.randn(3, 2, 7, requires_grad=True)
    target = torch.randint(0, 7, (3, 2))
    target[1, 0] = -100
    copy = logits.detach().clone()
    got = parallel_cross_entropy(copy.requires_grad_() * 1, target)
    want = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(3, 2)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, copy, grad), torch.autograd.grad(want, logits, grad)
    )


def test_permutation() -> None:
    """Copies sorted by expert; their sum, weighted with the probabilities, and all gradients."""
    routing = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    tokens = torch.randn(4, 5, requires_grad=True)
    probs = torch.rand(4, 3, requires_grad=True)
    rows, chosen, row_map = moe_permute_with_probs(tokens, probs, routing, num_out_tokens=5)
    order = torch.tensor([0, 3, 0, 2, 2])  # experts 0, 0, 1, 1, 2
    torch.testing.assert_close(rows, tokens[order])
    torch.testing.assert_close(chosen, probs[order, torch.tensor([0, 0, 1, 1, 2])])
    merged = moe_unpermute(rows, row_map, probs, restore_shape=tokens.shape)
    plain = tokens * (probs * routing).sum(1, keepdim=True)
    torch.testing.assert_close(merged, plain)
    grad = torch.randn_like(merged)
    inputs = (tokens, probs)
    torch.testing.assert_close(
        torch.autograd.grad(merged, inputs, grad), torch.autograd.grad(plain, inputs, grad)
    )


def test_chunks() -> None:
    rows = torch.randn(6, 2, requires_grad=True)
    probs = torch.rand(6, requires_grad=True)
    sizes, order = torch.tensor([1, 3, 2]), torch.tensor([2, 0, 1])
    places = torch.tensor([4, 5, 0, 1, 2, 3])
    got = moe_sort_chunks_by_index_with_probs(rows, probs, sizes, order)
    torch.testing.assert_close(got, (rows[places], probs[places]))
    grads = (torch.randn(6, 2), torch.randn(6))
    back = torch.autograd.grad(got, (rows, probs), grads)
    torch.testing.assert_close(back, tuple(g[places.argsort()] for g in grads))


UNFUSED = {
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_permute_fusion": False,
    "bias_activation_fusion": False,
}


@pytest.mark.parametrize("fusion", UNFUSED)
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_in_the_model(te: ParallelContext, fusion: str, packing: bool) -> None:
    """Fused, which all but the activation are by default, and left alone."""
    config = with_section(tiny_config(), "data", packing=packing)
    config = with_section(config, "moe", dispatcher="alltoall")
    batches = packed() if packing else [padded()]
    fused = {name: value for name, value in UNFUSED.items() if name != fusion}
    if fusion == "bias_activation_fusion":
        fused[fusion] = True
    records = []
    for megatron in (UNFUSED, fused):
        changed = config.model_copy(update={"megatron": megatron})
        records.append(take_step(changed, te, batches))
    assert disagreement(records[1], records[0]) == {}


def test_they_are_the_default(te: ParallelContext) -> None:
    built = transformer_config(with_section(tiny_config(), "moe", dispatcher="alltoall"), te.device)
    assert built.apply_rope_fusion and built.cross_entropy_loss_fusion and built.moe_permute_fusion
    assert built.cross_entropy_fusion_impl == "te"
    # The default dispatcher has no rows that Megatron could sort.
    assert not transformer_config(tiny_config(), te.device).moe_permute_fusion
