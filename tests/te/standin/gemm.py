"""Matrix products, as ``csrc/extensions/gemm.cpp`` of Transformer Engine defines them.

A matrix is what remains when all axes of a tensor but the last are flattened.  cuBLAS reads the
row-major memory of A, B and D as their transposes, so D = op(B) op(A) with op(X) = X or X'.
Products are accumulated in fp32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.te.standin.enums import torch_dtype


def _product(a: Tensor, transa: bool, b: Tensor, transb: bool) -> Tensor:
    """op(B) op(A) in fp32, as a matrix."""
    left = b.reshape(-1, b.shape[-1]).float()
    right = a.reshape(-1, a.shape[-1]).float()
    return (left.t() if transb else left) @ (right.t() if transa else right)


def _store(product: Tensor, output: Tensor, accumulate: bool) -> None:
    """Round once: an accumulated sum too is made in fp32."""
    product = product.view(output.shape)
    output.copy_(output.float() + product if accumulate else product)


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """D, and with ``grad`` the gradient of the bias."""
    _only_plain(quantizer, gelu, comm_overlap)
    if alpha != 1.0 or beta not in (None, float(accumulate)):
        raise NotImplementedError(f"alpha {alpha} and beta {beta} have no stand-in.")
    if accumulate and D is None:
        raise ValueError("There is nothing to add to.")
    product = alpha * _product(A, transa, B, transb)
    if bias is not None and not grad:
        product = product + bias.float()
    if D is None:
        shape = product.shape if transb else (*B.shape[:-1], product.shape[-1])
        dtype = A.dtype if output_dtype is None else torch_dtype(output_dtype)
        D = torch.empty(shape, dtype=dtype)
    elif output_dtype is not None and D.dtype != torch_dtype(output_dtype):
        raise ValueError(f"The output is {D.dtype}, not {torch_dtype(output_dtype)}.")
    _store(product, D, accumulate)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = B.reshape(-1, B.shape[-1]).float().sum(0).to(D.dtype)
    return D, bias_grad, None, None


def te_general_grouped_gemm(
    A: list[Tensor],
    transa: bool,
    B: list[Tensor],
    transb: bool,
    D: list[Tensor],
    output_dtype: int,
    m_splits: list[int],
    bias: list[Tensor],
    bias_type: int,
    single_output: bool,
    pre_gelu_out: list[Tensor],
    grad: bool,
    workspace: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """One product per group; an empty group gives zeros, or adds nothing."""
    if any(one.numel() for one in (*bias, *pre_gelu_out)):
        raise NotImplementedError("A bias or an activation in a grouped product has no stand-in.")
    outputs = list(D[0].split(m_splits)) if single_output else D
    for a, b, output in zip(A, B, outputs, strict=True):
        if output.dtype != torch_dtype(output_dtype):
            raise ValueError(f"The output is {output.dtype}, not {torch_dtype(output_dtype)}.")
        if a.numel() and b.numel():
            _store(_product(a, transa, b, transb), output, accumulate)
        elif not accumulate:
            output.zero_()
    return bias


def _only_plain(quantizer: Any, gelu: bool, comm_overlap: Any) -> None:
    if quantizer is not None or gelu or comm_overlap is not None:
        raise NotImplementedError("Only plain matrix products have a stand-in.")
