"""Each token's experts and probabilities from the scores of all gates, with the balance loss.

One autograd function with a backward pass of its own, so that the forward pass starts few
kernels: on a GPU they are so small that starting them costs more than running them.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.autograd.function import once_differentiable


class RoutingSums(NamedTuple):
    """What the routers did with this rank's tokens of one micro-batch, without padding.

    Attributes:
        prob_ME: Summed routing probabilities, before top-k.
        load_ME: How many tokens activate each expert; together top-k times the tokens.
        all_load_ME: ``load_ME`` over all ranks that share the micro-batch.
    """

    prob_ME: Tensor
    load_ME: Tensor
    all_load_ME: Tensor


@dataclass(frozen=True)
class Summation:
    """What the sums of a micro-batch are for.

    Attributes:
        group: Ranks that hold other tokens of the same micro-batch (sequence parallelism).
        loss_gradient: The gradient of the balance losses with respect to ``prob_ME``, from
            ``all_load_ME``; called in the backward pass.  None where there is no loss.
    """

    group: torch.distributed.ProcessGroup | None
    loss_gradient: Callable[[Tensor], Tensor] | None


class Choice(NamedTuple):
    """The experts of every token.

    Attributes:
        probs_TE: fp32, the renormalized probabilities of the chosen experts, 0 elsewhere.
        routing_map_TE: bool, the chosen experts.
        scores_TE: The scores of each token's own gate, -inf at the experts that it may not use.
        sums: None where nothing is summed.
    """

    probs_TE: Tensor
    routing_map_TE: Tensor
    scores_TE: Tensor
    sums: RoutingSums | None


def choose_experts(
    scores_GTE: tuple[Tensor, ...],
    masks_MT: Tensor,
    top_k: int,
    minus_infinity: Tensor,
    summation: Summation | None,
) -> Choice:
    """Choose ``top_k`` experts for every token and renormalize their probabilities.

    Args:
        scores_GTE: fp32 ``(T, E)`` of the vision gate and of the text gate, -inf at the experts
            that a gate does not score; or of the joint gate alone.
        masks_MT: bool, image tokens and text tokens.  Padding is neither and is routed as text.
        top_k: Experts per token.
        minus_infinity: A scalar tensor on the device of the scores.
        summation: None to sum nothing.

    Returns:
        Differentiable are ``probs_TE`` and ``scores_TE``.  The gradient of the balance loss joins
        that of ``probs_TE`` with Megatron's scale of auxiliary losses.
    """
    probs_TE, scores_TE, routing_map_TE, *sums = _ChooseExperts.apply(
        masks_MT, top_k, minus_infinity, summation, *scores_GTE
    )
    return Choice(probs_TE, routing_map_TE, scores_TE, RoutingSums(*sums) if sums else None)


class _ChooseExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        masks_MT: Tensor,
        top_k: int,
        minus_infinity: Tensor,
        summation: Summation | None,
        *scores_GTE: Tensor,
    ) -> tuple[Tensor, ...]:
        # Scores of the chosen experts, and of all: one softmax takes both.
        both_scores = scores_GTE[0].new_empty(2, *scores_GTE[0].shape)
        chosen_TE, scores_TE = both_scores
        if len(scores_GTE) == 1:
            scores_TE.copy_(scores_GTE[0])
        else:
            torch.where(masks_MT[0].unsqueeze(1), *scores_GTE, out=scores_TE)
        ids_TK = torch.topk(scores_TE, top_k, dim=-1).indices
        routing_map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        torch.where(routing_map_TE, scores_TE, minus_infinity, out=chosen_TE)
        # Probabilities of the chosen experts, of all, and the routing map as numbers.
        planes = scores_TE.new_empty(3, *scores_TE.shape)
        torch.softmax(both_scores, dim=-1, out=planes[:2])
        sums: tuple[Tensor, ...] = ()
        ctx.loss_gradient = None
        if summation is not None:
            planes[2].copy_(routing_map_TE)
            masks = masks_MT.to(scores_TE.dtype).expand(2, *masks_MT.shape)
            prob_ME, load_ME = torch.bmm(masks, planes[1:])
            sums = prob_ME, load_ME, _summed(load_ME, summation.group)
            ctx.loss_gradient = summation.loss_gradient
        ctx.num_gates = len(scores_GTE)
        ctx.save_for_backward(masks_MT, planes, *sums[2:])
        ctx.mark_non_differentiable(routing_map_TE, *sums)
        ctx.set_materialize_grads(False)
        return planes[0], scores_TE, routing_map_TE, *sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_probs_TE: Tensor | None, grad_scores_TE: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        masks_MT, planes, *all_load_ME = ctx.saved_tensors
        parts_TE = [] if grad_scores_TE is None else [grad_scores_TE]
        if grad_probs_TE is not None:
            parts_TE.append(_softmax_backward(grad_probs_TE, planes[0]))
        if ctx.loss_gradient is not None:
            weight_ME = ctx.loss_gradient(*all_load_ME) * _loss_scale()
            weight_TE = masks_MT.to(weight_ME.dtype).t() @ weight_ME
            parts_TE.append(_softmax_backward(weight_TE, planes[1]))
        grad_TE = reduce(torch.add, parts_TE)
        grads: tuple[Tensor, ...] = (grad_TE,)
        if ctx.num_gates == 2:
            is_image_T1 = masks_MT[0].unsqueeze(1)
            grads = (grad_TE.masked_fill(~is_image_T1, 0.0), grad_TE.masked_fill(is_image_T1, 0.0))
        return None, None, None, None, *grads


def _softmax_backward(grad_TE: Tensor, probs_TE: Tensor) -> Tensor:
    return torch._softmax_backward_data(grad_TE.contiguous(), probs_TE, -1, probs_TE.dtype)


def _summed(load_ME: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return load_ME
    all_load_ME = load_ME.clone()
    torch.distributed.all_reduce(all_load_ME, group=group)
    return all_load_ME


def _loss_scale() -> Tensor | float:
    """Megatron's scale of auxiliary losses, which its schedules set; 1 before."""
    scale = MoEAuxLossAutoScaler.main_loss_backward_scale
    return 1.0 if scale is None else scale
