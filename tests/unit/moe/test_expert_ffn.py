"""The experts' arithmetic, both ways of it, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moiie_megatron.moe.expert_ffn import Activation, grouped_ffn, looped_ffn

HIDDEN, FFN = 16, 24
Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Activation], Tensor]


def oracle(
    rows: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, counts: Tensor, activation: Activation
) -> Tensor:
    """One row at a time."""
    outputs, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        for row in range(start, start + count):
            gate, up = (fc1[expert] @ rows[row]).chunk(2)
            outputs.append((fc2[expert] @ (activation(gate) * up)) * probs[row])
        start += count
    return torch.stack(outputs) if outputs else rows * 0.0


def inputs(counts: list[int], dtype: torch.dtype, ffn: int = FFN) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    experts, rows = len(counts), sum(counts)
    return [
        draw(rows, HIDDEN).to(dtype).requires_grad_(),
        draw(rows).abs().requires_grad_(),
        draw(experts, 2 * ffn, HIDDEN).to(dtype).requires_grad_(),
        draw(experts, HIDDEN, ffn).to(dtype).requires_grad_(),
    ]


def run(way: Way, tensors: list[Tensor], counts: list[int], activation: Activation) -> list[Tensor]:
    """The output and the gradients of rows, probabilities and both weights."""
    output = way(*tensors, torch.tensor(counts), activation)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, gradient)]


def assert_near(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        if want.numel():
            size = max(float(want.abs().max()), 1e-6)
            assert float((got.double() - want.double()).abs().max()) < tolerance * size


@pytest.mark.parametrize("counts", [[3, 5, 2], [0, 4, 0], [0, 0, 7], [1, 1, 1]])
@pytest.mark.parametrize("activation", [F.silu, F.gelu])
@pytest.mark.parametrize("way", [looped_ffn, grouped_ffn])
def test_equals_plain_autograd(way: Way, activation: Activation, counts: list[int]) -> None:
    tensors = inputs(counts, torch.float32)
    found = run(way, tensors, counts, activation)
    assert_near(found, run(oracle, tensors, counts, activation), 1e-5)
    for expert, count in enumerate(counts):
        if not count:
            assert not found[3][expert].any() and not found[4][expert].any()


@pytest.mark.parametrize("way", [looped_ffn, grouped_ffn])
def test_bf16_rounds_like_bf16(way: Way) -> None:
    """Against the same numbers in fp32: within a few roundings of 2 ** -9."""
    counts = [3, 5, 2]
    tensors = inputs(counts, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    found = run(way, tensors, counts, F.silu)
    assert [t.dtype for t in found[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    wanted = [t.to(torch.bfloat16) for t in run(oracle, exact, counts, F.silu)]
    wanted[2] = wanted[2].float()
    assert_near(found, wanted, 0.03)


def test_sizes_that_grouped_mm_refuses() -> None:
    tensors = inputs([2, 3], torch.float32, ffn=7)
    wanted = run(oracle, tensors, [2, 3], F.silu)
    assert_near(run(looped_ffn, tensors, [2, 3], F.silu), wanted, 1e-5)


def test_no_rows_at_all_give_zero_gradients() -> None:
    tensors = inputs([0, 0], torch.float32)
    output, *gradients = run(looped_ffn, tensors, [0, 0], F.silu)
    assert output.shape == (0, HIDDEN)
    assert all(not gradient.any() for gradient in gradients)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


def test_an_expanded_gradient_is_fine() -> None:
    """What the sum of an output sends back has stride 0."""
    tensors = inputs([2, 3], torch.float32)
    for way in (looped_ffn, grouped_ffn):
        output = way(*tensors, torch.tensor([2, 3]), F.silu)
        dense = torch.autograd.grad(output, tensors, torch.ones_like(output), retain_graph=True)
        assert_near(list(torch.autograd.grad(output.sum(), tensors)), list(dense), 1e-6)
