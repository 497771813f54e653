"""The module ``fused_weight_gradient_mlp_cuda`` of Apex: weight gradients added to a buffer."""

from __future__ import annotations

import importlib.machinery
import types

from torch import Tensor

NAME = "fused_weight_gradient_mlp_cuda"


def wgrad_gemm_accum_fp32(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    """``d_weight += d_output' input``, in fp32."""
    rows = d_output.reshape(-1, d_output.shape[-1])
    d_weight.add_(rows.float().t() @ input.reshape(-1, input.shape[-1]).float())


def wgrad_gemm_accum_fp16(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    """The same into a buffer of 16 bits, rounded once."""
    total = d_weight.float()
    wgrad_gemm_accum_fp32(input, d_output, total)
    d_weight.copy_(total)


def make() -> types.ModuleType:
    module = types.ModuleType(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    for function in (wgrad_gemm_accum_fp32, wgrad_gemm_accum_fp16):
        setattr(module, function.__name__, function)
    return module
