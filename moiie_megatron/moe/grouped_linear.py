"""Products of sorted rows with one weight per group, and the gated activation between them.

Shapes: R rows sorted by expert, E experts, I inputs, O outputs, F FFN size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT = 16  # bytes, of every stride that torch's grouped_mm accepts
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, rows_per_expert: Tensor) -> Tensor:
    """Every row times the weight of its expert: ``(R, O)``.

    ``torch.nn.functional.grouped_mm`` where it is available and the sizes are aligned, one
    product per expert otherwise.  The weight is stored ``(E, out, in)`` and passed transposed,
    the layout that was fastest in bf16.  Experts without rows get a zero gradient.

    Args:
        rows_per_expert: int64 ``(E,)``, adding up to R, on the CPU (where Megatron's dispatchers
            leave it).
    """
    if _fits_grouped_mm(rows_RI, weight_EOI):
        ends_E = rows_per_expert.cumsum(0).to(rows_RI.device, torch.int32, non_blocking=True)
        product = F.grouped_mm(rows_RI, weight_EOI.transpose(1, 2), offs=ends_E)
        return _ContiguousGrad.apply(product)
    parts = rows_RI.split(rows_per_expert.tolist())
    return torch.cat([p @ w.t() for p, w in zip(parts, weight_EOI.unbind(), strict=True)])


def _fits_grouped_mm(rows_RI: Tensor, weight_EOI: Tensor) -> bool:
    widths = (rows_RI.shape[1], weight_EOI.shape[1])
    aligned = all(width * rows_RI.element_size() % _ALIGNMENT == 0 for width in widths)
    known = hasattr(F, "grouped_mm") and rows_RI.dtype in _GROUPED_DTYPES
    return known and aligned and rows_RI.shape[0] > 0


class _ContiguousGrad(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm refuses an expanded (stride 0) one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def gated(gate_up_R2F: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``activation(gate) * up`` of ``(R, 2 F)``, gate in the first half: ``(R, F)``."""
    if activation is F.silu:
        return _GatedSilu.apply(gate_up_R2F)
    gate, up = gate_up_R2F.chunk(2, dim=-1)
    return activation(gate) * up


class _GatedSilu(torch.autograd.Function):
    """``silu(gate) * up``, whose gradient is written in place of both halves at once.

    Keeps nothing but its input (autograd would keep ``silu(gate)`` too) and saves the
    concatenation of the halves' gradients.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up
