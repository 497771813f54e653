"""Transformer Engine's FusedAdam and Megatron's norm and clipping, over the stand-in."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformer_engine_torch as tex
from megatron.core.optimizer import clip_grads
from transformer_engine.pytorch import optimizers
from transformer_engine.pytorch.optimizers import FusedAdam, multi_tensor_applier

from moiie_megatron.mcore.parallel import ParallelContext


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 4), (5,), (2, 2, 2))
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        for weight in weights:
            grad = torch.randn(weight.shape, generator=generator)
            weight.grad = grad.to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fused_adam_is_adamw(decay: float) -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": decay}
    ours = parameters(torch.float32)
    theirs = copy.deepcopy(ours)
    steps(FusedAdam(ours, **options), ours)
    steps(torch.optim.AdamW(theirs, **options), theirs)
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours[0], parameters(torch.float32)[0])


def test_fused_adam_with_l2_is_adam() -> None:
    ours = parameters(torch.float32)
    theirs = copy.deepcopy(ours)
    steps(FusedAdam(ours, weight_decay=0.1, adam_w_mode=False), ours)
    steps(torch.optim.Adam(theirs, weight_decay=0.1), theirs)
    torch.testing.assert_close(ours, theirs)


def test_fused_adam_keeps_fp32_copies() -> None:
    """bf16 weights are its rounded fp32 copies."""
    ours = parameters(torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in ours]
    optimizer = FusedAdam(ours, lr=1e-2, master_weights=True)
    steps(optimizer, ours)
    reference = torch.optim.AdamW(wide, lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        for weight in wide:
            weight.grad = torch.randn(weight.shape, generator=generator).bfloat16().float()
        reference.step()
    for mine, other in zip(ours, wide, strict=True):
        torch.testing.assert_close(optimizer.state[mine]["master_param"], other.detach())
        assert torch.equal(mine, other.bfloat16())


def test_megatron_clips_with_it(te: ParallelContext) -> None:
    weights = parameters(torch.float32)
    grads = [torch.randn_like(weight) for weight in weights]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad.clone()
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))
    # Megatron-Core 0.19 takes none of them if one is missing, as it is in 2.12.
    newest = "multi_tensor_scale_tensor"
    is_used = newest not in inspect.getsource(clip_grads) or hasattr(optimizers, newest)
    assert (clip_grads.l2_norm_impl is tex.multi_tensor_l2norm) == is_used
    assert (clip_grads.multi_tensor_scale_impl is tex.multi_tensor_scale) == is_used
    flag = torch.zeros(1, dtype=torch.int)
    total, each = multi_tensor_applier(tex.multi_tensor_l2norm, flag, [grads], True)
    torch.testing.assert_close(total, norm.reshape(1))
    torch.testing.assert_close(each, torch.stack([grad.norm() for grad in grads]))
    clip_grads.clip_grad_by_total_norm_fp32(weights, max_norm=0.5, total_norm=float(norm))
    after = torch.linalg.vector_norm(torch.cat([weight.grad.flatten() for weight in weights]))
    torch.testing.assert_close(after, torch.tensor(0.5), rtol=1e-4, atol=0)


def test_scale_reports_what_is_not_finite() -> None:
    flag, target = torch.zeros(1, dtype=torch.int), torch.zeros(2)
    multi_tensor_applier(tex.multi_tensor_scale, flag, [[torch.ones(2)], [target]], 3.0)
    assert target.tolist() == [3, 3] and not flag
    source = torch.tensor([1, torch.inf])
    multi_tensor_applier(tex.multi_tensor_scale, flag, [[source], [target]], 3.0)
    assert flag
