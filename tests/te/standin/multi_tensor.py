"""Functions on lists of tensors: scaling, the norm, Adam.  All compute in fp32.

``tensor_lists`` has one list per role (inputs, outputs, ...), and the tensors at one position
belong together.  ``noop_flag`` becomes 1 where a kernel has seen a number that is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """Outputs = scale x inputs."""
    inputs, outputs = tensor_lists
    for source, target in zip(inputs, outputs, strict=True):
        if not source.isfinite().all():
            noop_flag.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_l2norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    per_tensor: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together ``(1,)`` and, if wanted, of each."""
    norms = torch.stack([torch.linalg.vector_norm(one.float()) for one in tensor_lists[0]])
    return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else norms.new_zeros(0)


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam with decoupled weight decay (mode 1) or with L2 regularisation (mode 0).

    The lists: gradients, weights, first and second moments, and perhaps fp32 copies of the
    weights, which are updated then and rounded to the weights.
    """
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for grad, weight, first, second, *rest in zip(*tensor_lists, strict=True):
        main = rest[0] if rest else weight
        g, p = grad.float(), main.float()
        if mode == 0:
            g = g + weight_decay * p
        first.copy_(first.float() * beta1 + g * (1 - beta1))
        second.copy_(second.float() * beta2 + g * g * (1 - beta2))
        update = (first.float() / correction1) / ((second.float() / correction2).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * p
        updated = p - lr * update
        main.copy_(updated)
        if rest:
            weight.copy_(updated)
