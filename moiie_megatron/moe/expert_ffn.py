"""Gated FFNs of several experts on rows sorted by expert: ``p * fc2(act(gate(x)) * up(x))``.

Two implementations of the same numbers.  ``grouped_ffn`` passes all experts to one kernel, which
is what a GPU needs.  ``looped_ffn`` computes one expert after the other: a CPU runs
``grouped_mm`` as a loop anyway, and this way the intermediate results of an expert stay in cache
and the next expert reuses their memory.

Both weights have a leading axis of experts: fc1 is ``(L, 2 F, D)`` with the gate in the first
half, fc2 ``(L, D, F)``.

Shape letters: see ``moe/__init__.py``; R rows are sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moiie_megatron.layout.alignment import GROUPED_MM_BYTES

Activation = Callable[[Tensor], Tensor]

# Activations and the kernels of their gradients, which write into a given tensor.
ACTIVATION_GRADS: dict[Activation, Callable[..., Tensor]] = {
    F.silu: torch.ops.aten.silu_backward.grad_input,
    F.gelu: torch.ops.aten.gelu_backward.grad_input,
}

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

    The probability multiplies the output of fc2, not its input: the same number, on rows that
    are several times shorter.  Experts without rows get a zero gradient.

    Args:
        rows_RD: Rows sorted by expert.
        probs_R: Any float dtype; the product is taken in the wider one and rounded once.
        fc1: ``(L, 2 F, D)``.
        fc2: ``(L, D, F)``.
        rows_per_expert: int64 ``(L,)``, adding up to R, on the CPU (where Megatron's dispatchers
            leave it).
        activation: One of ``ACTIVATION_GRADS``.
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
    ends_L = rows_per_expert.cumsum(0).to(rows_RD.device, torch.int32, non_blocking=True)
    # Weights stored as (L, out, in) and passed transposed were the fastest in bf16.
    gate_RF, up_RF = F.grouped_mm(rows_RD, fc1.transpose(1, 2), offs=ends_L).chunk(2, dim=-1)
    output_RD = F.grouped_mm(activation(gate_RF) * up_RF, fc2.transpose(1, 2), offs=ends_L)
    return (_ContiguousGrad.apply(output_RD) * probs_R.unsqueeze(-1)).to(rows_RD.dtype)


def _fits_grouped_mm(rows_RD: Tensor, fc1: Tensor, fc2: Tensor) -> bool:
    widths = (rows_RD.shape[1], fc1.shape[1], fc2.shape[2])
    aligned = all(width * rows_RD.element_size() % GROUPED_MM_BYTES == 0 for width in widths)
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
    """``expert_ffn`` as plain matrix products, one expert after the other."""
    counts = rows_per_expert.tolist()
    output_RD: Tensor = _LoopedFFN.apply(rows_RD, probs_R, fc1, fc2, counts, activation)
    return output_RD


def _row_blocks(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and their rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _LoopedFFN(torch.autograd.Function):
    """The loop over experts, with its gradient written out.

    Every expert saves four tensors of its own for backward.  malloc reuses memory of that size
    from step to step, while one large tensor for all experts would be mapped, and its pages
    faulted in, anew in every step.
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
        saved: list[Tensor] = []
        for expert, block in _row_blocks(counts):
            gate_up = rows[block] @ fc1[expert].t()
            gate, up = gate_up.chunk(2, dim=1)
            activated = activation(gate)
            inner = activated * up
            raw = inner @ fc2[expert].t()
            output[block] = raw * probs[block].unsqueeze(1)
            saved += [gate_up, activated, inner, raw]
        ctx.save_for_backward(rows, probs, fc1, fc2, *saved)
        ctx.counts, ctx.activation = counts, activation
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, fc1, fc2, *saved = ctx.saved_tensors
        grad_rows, grad_probs = torch.empty_like(rows), torch.empty_like(probs)
        grad_fc1, grad_fc2 = torch.empty_like(fc1), torch.empty_like(fc2)
        # Scratch memory of the largest expert, which all experts use in turn.
        most_rows = max(ctx.counts, default=0)
        inner_scratch = rows.new_empty(most_rows, fc2.shape[2])
        gate_up_scratch = rows.new_empty(most_rows, fc1.shape[1])
        for index, (expert, block) in enumerate(_row_blocks(ctx.counts)):
            gate_up, activated, inner, raw = saved[4 * index : 4 * index + 4]
            gate, up = gate_up.chunk(2, dim=1)
            grad_inner, grad_gate_up = inner_scratch[: len(raw)], gate_up_scratch[: len(raw)]
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
            # output = raw * p
            grad_output = grad[block].to(probs.dtype)
            torch.sum(grad_output * raw, dim=1, out=grad_probs[block])
            grad_raw = (grad_output * probs[block].unsqueeze(1)).to(rows.dtype)
            # raw = inner @ fc2.t()
            torch.mm(grad_raw.t(), inner, out=grad_fc2[expert])
            torch.mm(grad_raw, fc2[expert], out=grad_inner)
            # inner = act(gate) * up
            torch.mul(grad_inner, activated, out=grad_up)
            grad_activated = grad_inner.mul_(up)
            ACTIVATION_GRADS[ctx.activation](grad_activated, gate, grad_input=grad_gate)
            # gate_up = rows @ fc1.t()
            torch.mm(grad_gate_up.t(), rows[block], out=grad_fc1[expert])
            torch.mm(grad_gate_up, fc1[expert], out=grad_rows[block])
        for expert, count in enumerate(ctx.counts):
            if not count:
                grad_fc1[expert].zero_()
                grad_fc2[expert].zero_()
        return grad_rows, grad_probs, grad_fc1, grad_fc2, None, None
