"""Gated FFNs of several experts on rows sorted by expert: ``p * fc2(act(gate) * up)``.

Two ways to the same numbers.  ``grouped_ffn`` hands all experts to one kernel, which is what a
GPU wants.  ``looped_ffn`` takes one expert at a time from its input to its output: a CPU runs
``grouped_mm`` as a loop anyway, and this way the intermediate results of an expert stay in its
cache and their memory is used again by the next one.

Shapes: R rows sorted by expert, E experts, D hidden, F FFN size; fc1 is ``(E, 2 F, D)`` with the
gate in the first half, fc2 ``(E, D, F)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


# Activations and the kernels of their gradients, which write where they are told.
ACTIVATION_GRADS: dict[Activation, Callable[..., Tensor]] = {
    F.silu: torch.ops.aten.silu_backward.grad_input,
    F.gelu: torch.ops.aten.gelu_backward.grad_input,
}

_ALIGNMENT = 16  # bytes, of every stride that torch's grouped_mm accepts
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expert_ffn(
    rows_RD: Tensor,
    probs_R: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    rows_per_expert: Tensor,
    activation: Activation,
) -> Tensor:
    """Every row through its expert's FFN, times its probability: ``(R, D)``.

    The probability weighs the output of the second product, not what goes into it: that is the
    same number, on rows that are several times shorter.  Experts without rows get a zero
    gradient.

    Args:
        probs_R: Any float dtype; the product is taken in the wider one and rounded once.
        rows_per_expert: int64 ``(E,)``, adding up to R, on the CPU (where Megatron's dispatchers
            leave it).
    """
    if rows_RD.is_cuda and _fits_grouped_mm(rows_RD, fc1, fc2):
        return grouped_ffn(rows_RD, probs_R, fc1, fc2, rows_per_expert, activation)
    return looped_ffn(rows_RD, probs_R, fc1, fc2, rows_per_expert, activation)


def grouped_ffn(
    rows_RD: Tensor,
    probs_R: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    rows_per_expert: Tensor,
    activation: Activation,
) -> Tensor:
    """``expert_ffn`` on ``torch.nn.functional.grouped_mm``."""
    ends_E = rows_per_expert.cumsum(0).to(rows_RD.device, torch.int32, non_blocking=True)
    # The layout (E, out, in), passed transposed, was the fastest in bf16.
    gate, up = F.grouped_mm(rows_RD, fc1.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    output = F.grouped_mm(activation(gate) * up, fc2.transpose(1, 2), offs=ends_E)
    return (_ContiguousGrad.apply(output) * probs_R.unsqueeze(-1)).to(rows_RD.dtype)


def _fits_grouped_mm(rows_RD: Tensor, fc1: Tensor, fc2: Tensor) -> bool:
    widths = (rows_RD.shape[1], fc1.shape[1], fc2.shape[2])
    aligned = all(width * rows_RD.element_size() % _ALIGNMENT == 0 for width in widths)
    known = hasattr(F, "grouped_mm") and rows_RD.dtype in _GROUPED_DTYPES
    return known and aligned and rows_RD.shape[0] > 0


class _ContiguousGrad(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm refuses an expanded (stride 0) one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def looped_ffn(
    rows_RD: Tensor,
    probs_R: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    rows_per_expert: Tensor,
    activation: Activation,
) -> Tensor:
    """``expert_ffn`` as plain products, one expert after the other."""
    counts = rows_per_expert.tolist()
    output: Tensor = _LoopedFFN.apply(rows_RD, probs_R, fc1, fc2, counts, activation)
    return output


def _blocks(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Every expert that has rows, and which."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _LoopedFFN(torch.autograd.Function):
    """Keeps both products, the activation and what goes into the second product.

    Every expert's in tensors of their own: malloc reuses those, while it would map and fault in
    fresh pages for one large tensor of all experts in every step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        probs: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        counts: list[int],
        activation: Activation,
    ) -> Tensor:
        output = torch.empty_like(rows)
        kept: list[Tensor] = []
        for expert, block in _blocks(counts):
            gate_up = rows[block] @ fc1[expert].t()
            gate, up = gate_up.chunk(2, dim=1)
            activated = activation(gate)
            inner = activated * up
            raw = inner @ fc2[expert].t()
            output[block] = raw * probs[block].unsqueeze(1)
            kept += (gate_up, activated, inner, raw)
        ctx.save_for_backward(rows, probs, fc1, fc2, *kept)
        ctx.counts, ctx.activation = counts, activation
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, fc1, fc2, *kept = ctx.saved_tensors
        grad_rows, grad_probs = torch.empty_like(rows), torch.empty_like(probs)
        grad_fc1, grad_fc2 = torch.empty_like(fc1), torch.empty_like(fc2)
        # Memory that every expert uses in turn.
        largest = max(ctx.counts, default=0)
        grad_inners, grad_gate_ups = (rows.new_empty(largest, w.shape[1]) for w in (fc2.mT, fc1))
        by_expert = zip(_blocks(ctx.counts), zip(*[iter(kept)] * 4, strict=True), strict=True)
        for (expert, block), (gate_up, activated, inner, raw) in by_expert:
            wide = grad[block].to(probs.dtype)
            torch.sum(wide * raw, dim=1, out=grad_probs[block])
            grad_raw = (wide * probs[block].unsqueeze(1)).to(rows.dtype)
            torch.mm(grad_raw.t(), inner, out=grad_fc2[expert])
            grad_inner = torch.mm(grad_raw, fc2[expert], out=grad_inners[: len(raw)])
            grad_gate_up = grad_gate_ups[: len(raw)]
            gate, up = gate_up.chunk(2, dim=1)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
            torch.mul(grad_inner, activated, out=grad_up)
            ACTIVATION_GRADS[ctx.activation](grad_inner.mul_(up), gate, grad_input=grad_gate)
            torch.mm(grad_gate_up.t(), rows[block], out=grad_fc1[expert])
            torch.mm(grad_gate_up, fc1[expert], out=grad_rows[block])
        for expert, count in enumerate(ctx.counts):
            if not count:
                grad_fc1[expert].zero_()
                grad_fc2[expert].zero_()
        return grad_rows, grad_probs, grad_fc1, grad_fc2, None, None
