"""Cross-entropy over a vocabulary that may be divided among ranks, without Triton.

Both functions of ``pytorch/triton/cross_entropy.py``, in the two forms that its versions have: the
forward pass leaves the gradient of the logits for the backward pass, which multiplies it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _loss_and_gradient(
    logits: Tensor, target: Tensor, group: Any, ignored: int
) -> tuple[Tensor, Tensor]:
    """Losses ``(b, s)`` in fp32, and their derivatives by the logits ``(b, s, V / ranks)``."""
    x = logits.float()
    rank = 0 if group is None else group.rank()
    shifted = target.reshape(x.shape[:2]) - rank * x.shape[2]
    here = (shifted >= 0) & (shifted < x.shape[2])
    index = torch.where(here, shifted, 0).unsqueeze(2)
    largest = x.amax(2, keepdim=True)
    _reduce(largest, group, dist.ReduceOp.MAX)
    exponentials = (x - largest).exp()
    total = exponentials.sum(2, keepdim=True)
    at_target = torch.where(here.unsqueeze(2), (x - largest).gather(2, index), 0.0)
    for value in (total, at_target):
        _reduce(value, group, dist.ReduceOp.SUM)
    gradient = exponentials / total
    gradient.scatter_add_(2, index, -here.unsqueeze(2).float())
    counts = (target.reshape(x.shape[:2]) != ignored).unsqueeze(2)
    losses = torch.where(counts, total.log() - at_target, 0.0).squeeze(2)
    return losses, torch.where(counts, gradient, 0.0).to(logits.dtype)


def _reduce(value: Tensor, group: Any, operation: Any) -> None:
    if group is not None:
        dist.all_reduce(value, op=operation, group=group)


def forward_of_gradient(
    _input: Tensor,
    target: Tensor,
    label_smoothing: float,
    reduce_loss: bool,
    dist_process_group: Any,
    ignore_idx: int,
) -> tuple[Tensor, Tensor]:
    """2.12: the input's memory becomes the gradient."""
    _only_plain(label_smoothing, reduce_loss)
    losses, gradient = _loss_and_gradient(_input, target, dist_process_group, ignore_idx)
    return losses, _input.copy_(gradient)


def backward_of_gradient(
    _input: Tensor, grad_output: Tensor, is_cg_capturable: bool = False
) -> Tensor:
    return _input.mul_(grad_output.unsqueeze(-1) if grad_output.numel() > 1 else grad_output)


def forward_of_statistics(
    _input: Tensor,
    target: Tensor,
    label_smoothing: float,
    reduce_loss: bool,
    dist_process_group: Any,
    ignore_idx: int,
    overwrite_input: bool,
) -> tuple[Any, ...]:
    """2.20: the gradient and no statistics."""
    _only_plain(label_smoothing, reduce_loss, overwrite_input)
    losses, gradient = _loss_and_gradient(_input, target, dist_process_group, ignore_idx)
    return losses, gradient, losses.new_empty(0), target, None, 0, 1


def backward_of_statistics(
    saved_input: Tensor,
    stats: Tensor,
    target: Tensor,
    n_non_ignore: Tensor | None,
    grad_output: Tensor,
    label_smoothing: float,
    reduce_loss: bool,
    rank: int,
    world_size: int,
    ignore_idx: int,
) -> Tensor:
    return backward_of_gradient(saved_input, grad_output)


def _only_plain(*values: Any) -> None:
    if any(values):
        raise NotImplementedError("Only the plain loss of every token has a stand-in.")


FORMS = (
    (forward_of_gradient, backward_of_gradient),
    (forward_of_statistics, backward_of_statistics),
)
