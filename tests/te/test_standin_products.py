"""The stand-in's matrix products and norm against torch."""

from __future__ import annotations

import fused_weight_gradient_mlp_cuda as apex
import pytest
import torch
import transformer_engine_torch as tex
from torch import Tensor
from torch.nn import functional as F

K, M, N = 5, 3, 4
EMPTY = torch.empty(0)


def gemm(
    a: Tensor, transa: bool, b: Tensor, transb: bool, out: Tensor | None = None, **options: object
) -> Tensor:
    given = {"bias": None, "grad": False, "accumulate": False, "dtype": None} | options
    return tex.generic_gemm(
        *(a, transa, b, transb, out, None, given["dtype"], given["bias"], tex.DType.kBFloat16),
        *(False, None, given["grad"], EMPTY, 0, given["accumulate"], False),
    )


@pytest.mark.parametrize("transa", [True, False])
@pytest.mark.parametrize("transb", [True, False])
def test_transpositions(transa: bool, transb: bool) -> None:
    """D = op(B) op(A)."""
    left, right = torch.randn(N, K), torch.randn(K, M)
    a = right.t().contiguous() if transa else right
    b = left.t().contiguous() if transb else left
    torch.testing.assert_close(gemm(a, transa, b, transb)[0], left @ right)


def test_the_three_products_of_a_linear_layer() -> None:
    """Output, input gradient and weight gradient, with a sequence and a batch axis."""
    x = torch.randn(2, N, K, requires_grad=True)
    weight, bias = torch.randn(M, K, requires_grad=True), torch.randn(M, requires_grad=True)
    want = F.linear(x, weight, bias)
    output, *_ = gemm(weight.detach(), True, x.detach(), False, bias=bias.detach())
    torch.testing.assert_close(output, want)
    grad = torch.randn_like(want)
    dx, dw, db = torch.autograd.grad(want, (x, weight, bias), grad)
    torch.testing.assert_close(gemm(weight.detach(), False, grad, False)[0], dx)
    got, bias_grad, *_ = gemm(x.detach(), False, grad, True, bias=bias.detach(), grad=True)
    torch.testing.assert_close(got, dw)
    torch.testing.assert_close(bias_grad, db)


def test_accumulates_in_fp32() -> None:
    """bf16 operands, into an fp32 buffer that holds something."""
    x, grad = torch.randn(N, K).bfloat16(), torch.randn(N, M).bfloat16()
    buffer = torch.randn(M, K)
    want = buffer + grad.float().t() @ x.float()
    gemm(x, False, grad, True, buffer, accumulate=True, dtype=tex.DType.kFloat32)
    torch.testing.assert_close(buffer, want)
    again = want.clone()
    apex.wgrad_gemm_accum_fp32(x.view(2, 2, K), grad.view(2, 2, M), again)
    torch.testing.assert_close(again, want + grad.float().t() @ x.float())


def test_rounds_once() -> None:
    a, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    output, *_ = gemm(a, True, b, False)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, (b.float() @ a.float().t()).bfloat16())


def test_what_the_stand_in_cannot_do_is_an_error() -> None:
    a, b = torch.randn(M, K), torch.randn(N, K)
    with pytest.raises(NotImplementedError):
        gemm(a, True, b, False, dtype=tex.DType.kFloat8E4M3)
    with pytest.raises(ValueError, match="output is"):
        gemm(a, True, b, False, torch.empty(N, M), dtype=tex.DType.kBFloat16)
    with pytest.raises(NotImplementedError, match="swiglu has no stand-in"):
        tex.swiglu(a, None)


SPLITS = [2, 0, 3]


def grouped(a: list[Tensor], transa: bool, b: list[Tensor], transb: bool, *out: object) -> None:
    outputs, single, accumulate = out
    empty = [EMPTY] * len(a)
    tex.te_general_grouped_gemm(
        *(a, transa, b, transb, outputs, tex.DType.kFloat32, SPLITS, empty, tex.DType.kBFloat16),
        *(single, empty, False, [EMPTY], 0, accumulate, False, 0),
    )


def test_groups() -> None:
    """Forward into one tensor; weight gradients into one each, of which one group has no rows."""
    weights = [torch.randn(M, K) for _ in SPLITS]
    rows = list(torch.randn(sum(SPLITS), K).split(SPLITS))
    output = torch.full((sum(SPLITS), M), torch.nan)
    grouped(weights, True, rows, False, [output], True, False)
    want = [x @ w.t() for x, w in zip(rows, weights, strict=True)]
    torch.testing.assert_close(output, torch.cat(want))
    grads = list(torch.randn(sum(SPLITS), M).split(SPLITS))
    products = [g.t() @ x for g, x in zip(grads, rows, strict=True)]
    fresh = [torch.full((M, K), torch.nan) for _ in SPLITS]
    grouped(rows, False, grads, True, fresh, False, False)
    torch.testing.assert_close(fresh, products)
    assert fresh[1].eq(0).all()
    buffers = [torch.ones(M, K) for _ in SPLITS]
    grouped(rows, False, grads, True, buffers, False, True)
    torch.testing.assert_close(buffers, [1 + product for product in products])


@pytest.mark.parametrize("centered", [False, True])
def test_rmsnorm(centered: bool) -> None:
    x = torch.randn(2, N, K, requires_grad=True)
    weight = torch.randn(K, requires_grad=True)
    want = F.rms_norm(x, (K,), weight + 1 if centered else weight, eps=1e-3)
    raw = x.detach(), weight.detach()
    y, mean, r = tex.rmsnorm_fwd(*raw, 1e-3, None, None, tex.DType.kFloat32, 0, centered)
    assert mean is None and r.shape == (2 * N,)
    torch.testing.assert_close(y, want)
    grad = torch.randn_like(want)
    dx, dw = tex.rmsnorm_bwd(grad, raw[0], r, raw[1], 0, centered)
    torch.testing.assert_close((dx, dw), torch.autograd.grad(want, (x, weight), grad))
