"""The balance loss against the reference, and against Megatron-Core's."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from torch import Tensor

from moiie_megatron.moe.choose_experts import Summation, choose_experts
from moiie_megatron.moe.losses import BalanceLoss
from tests.parity import golden

CASES = golden.numbers("aux_loss")
LAYERS = [(name, layer) for name, case in CASES.items() for layer in range(case["num_layers"])]
ONE_LAYER = [name for name, case in CASES.items() if case["num_layers"] == 1]


@dataclass(frozen=True)
class Ours:
    """The loss of one router, its gradient, and what it was computed from."""

    loss: Tensor
    gradient: Tensor
    probs: Tensor
    routing_map: Tensor


def _ours(logits: Tensor, mask: Tensor, top_k: int) -> Ours:
    device = torch.device("cpu")
    loss = BalanceLoss([logits.shape[1]], top_k, device)
    masks_MT = torch.stack([torch.zeros_like(mask), mask])
    summation = Summation(None, lambda load: loss.gradient(load).expand(2, -1))
    choice = choose_experts((logits,), masks_MT, top_k, torch.tensor(float("-inf")), summation)
    assert choice.sums is not None
    # Nothing but the balance loss has a gradient.
    (gradient,) = torch.autograd.grad(choice.probs_TE.sum() * 0.0, logits)
    value = loss.value(choice.sums.prob_ME, choice.sums.all_load_ME).squeeze(0)
    return Ours(value, gradient, torch.softmax(logits, dim=-1), choice.routing_map_TE)


def _inputs(name: str, layer: int) -> tuple[Tensor, Tensor]:
    data = golden.tensors("aux_loss")
    logits = data[f"{name}.logits.{layer}"].clone().requires_grad_()
    mask = data.get(f"{name}.selected_attention_mask", torch.ones(logits.shape[0]))
    return logits, mask.flatten().bool()


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_value_of_every_layer(name: str, layer: int) -> None:
    logits, mask = _inputs(name, layer)
    ours = _ours(logits, mask, CASES[name]["top_k"])
    want = CASES[name]["per_layer_loss"][layer]
    golden.assert_close(ours.loss, torch.tensor(want), name)


@pytest.mark.parametrize("name", ONE_LAYER)
def test_gradient(name: str) -> None:
    """With one layer the reference's pooling over layers changes nothing."""
    logits, mask = _inputs(name, 0)
    gradient = _ours(logits, mask, CASES[name]["top_k"]).gradient
    golden.assert_close(gradient, golden.tensors("aux_loss")[f"{name}.grad.0"], name)


@pytest.mark.parametrize(("name", "layer"), [x for x in LAYERS if "noimage" not in x[0]])
def test_megatron_times_top_k(name: str, layer: int) -> None:
    logits, mask = _inputs(name, layer)
    case = CASES[name]
    ours = _ours(logits, mask, case["top_k"])
    megatron = switch_load_balancing_loss_func(
        probs=ours.probs[mask],
        tokens_per_expert=ours.routing_map[mask].sum(dim=0),
        total_num_tokens=int(mask.sum()),
        topk=case["top_k"],
        num_experts=case["num_experts_scored"],
        moe_aux_loss_coeff=1.0,
        fused=False,
    )
    torch.testing.assert_close(ours.loss, megatron * case["top_k"], rtol=1e-5, atol=1e-6)
    (theirs,) = torch.autograd.grad(megatron, logits)
    torch.testing.assert_close(ours.gradient, theirs * case["top_k"], rtol=1e-5, atol=1e-7)


def test_no_token_is_exactly_zero() -> None:
    logits = torch.randn(18, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    ours = _ours(logits, torch.zeros(18, dtype=torch.bool), 2)
    assert ours.loss == 0.0 and not ours.gradient.any()


def test_padding_has_no_influence() -> None:
    logits, mask = _inputs("lan_k3_L1_pad", 0)
    assert not mask.all()
    other = torch.where(mask.unsqueeze(1), logits, torch.tensor([9.0, -9.0, 4.0]))
    assert torch.equal(_ours(logits, mask, 2).loss, _ours(other, mask, 2).loss)
