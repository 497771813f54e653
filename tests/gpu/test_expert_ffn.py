"""The grouped product of all experts on a GPU, against one expert after the other on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moiie_megatron.moe.expert_ffn import expert_ffn, looped_ffn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

HIDDEN, FFN = 64, 96
COUNTS = ([16, 0, 5, 43], [0, 0, 64, 0], [1, 1, 1, 1])


def _inputs(counts: list[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    experts, rows = len(counts), sum(counts)
    shapes = ((rows, HIDDEN), (rows,), (experts, 2 * FFN, HIDDEN), (experts, HIDDEN, FFN))
    return [(torch.randn(shape, generator=generator) * 0.3).to(dtype) for shape in shapes]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"]
)
def test_output_and_gradients(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    rows = torch.tensor(counts)
    inputs = _inputs(counts, dtype)
    on_cpu = [tensor.double().requires_grad_() for tensor in inputs]
    on_gpu = [tensor.cuda().requires_grad_() for tensor in inputs]
    wanted = looped_ffn(*on_cpu, rows, F.silu)
    found = expert_ffn(*on_gpu, rows, F.silu)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(wanted.shape, generator=generator).to(dtype)
    wanted_all = [wanted, *torch.autograd.grad(wanted, on_cpu, upstream.double())]
    found_all = [found, *torch.autograd.grad(found, on_gpu, upstream.cuda())]
    for got, want in zip(found_all, wanted_all, strict=True):
        assert got.is_cuda and got.dtype == dtype
        allowed = tolerance * float(want.abs().max().clamp(min=1e-6))
        assert float((got.cpu().double() - want).abs().max()) <= allowed
