"""The balance loss against the reference, and against Megatron-Core's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from torch import Tensor

from moiie_megatron.moe.losses import balance_losses
from tests.parity import golden

CASES = golden.numbers("aux_loss")
LAYERS = [(name, layer) for name, case in CASES.items() for layer in range(case["num_layers"])]
ONE_LAYER = [name for name, case in CASES.items() if case["num_layers"] == 1]


def _ours(logits: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the probabilities and the routing map that it was computed from."""
    probs = torch.softmax(logits, dim=-1)
    chosen = torch.topk(probs, top_k, dim=-1).indices
    routing_map = torch.zeros_like(probs, dtype=torch.bool).scatter(1, chosen, True)
    candidates = torch.tensor([float(logits.shape[1])])
    loss = balance_losses(probs, routing_map, mask.unsqueeze(1), candidates).loss_G.squeeze(0)
    return loss, probs, routing_map


def _inputs(name: str, layer: int) -> tuple[Tensor, Tensor]:
    data = golden.tensors("aux_loss")
    logits = data[f"{name}.logits.{layer}"].clone().requires_grad_()
    mask = data.get(f"{name}.selected_attention_mask", torch.ones(logits.shape[0]))
    return logits, mask.flatten().bool()


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_value_of_every_layer(name: str, layer: int) -> None:
    logits, mask = _inputs(name, layer)
    loss, _, _ = _ours(logits, mask, CASES[name]["top_k"])
    want = CASES[name]["per_layer_loss"][layer]
    golden.assert_close(loss, torch.tensor(want), name)


@pytest.mark.parametrize("name", ONE_LAYER)
def test_gradient(name: str) -> None:
    """With one layer the reference's pooling over layers changes nothing."""
    logits, mask = _inputs(name, 0)
    _ours(logits, mask, CASES[name]["top_k"])[0].backward()
    golden.assert_close(logits.grad, golden.tensors("aux_loss")[f"{name}.grad.0"], name)


@pytest.mark.parametrize(("name", "layer"), [x for x in LAYERS if "noimage" not in x[0]])
def test_megatron_times_top_k(name: str, layer: int) -> None:
    logits, mask = _inputs(name, layer)
    case = CASES[name]
    loss, probs, routing_map = _ours(logits, mask, case["top_k"])
    megatron = switch_load_balancing_loss_func(
        probs=probs[mask],
        tokens_per_expert=routing_map[mask].sum(dim=0),
        total_num_tokens=int(mask.sum()),
        topk=case["top_k"],
        num_experts=case["num_experts_scored"],
        moe_aux_loss_coeff=1.0,
        fused=False,
    )
    torch.testing.assert_close(loss, megatron * case["top_k"], rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, megatron))
    torch.testing.assert_close(ours, theirs * case["top_k"], rtol=1e-5, atol=1e-7)


def test_no_token_is_exactly_zero_and_keeps_the_graph() -> None:
    logits = torch.randn(18, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss, _, _ = _ours(logits, torch.zeros(18, dtype=torch.bool), 2)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_padding_has_no_influence() -> None:
    logits, mask = _inputs("lan_k3_L1_pad", 0)
    assert not mask.all()
    other = torch.where(mask.unsqueeze(1), logits, torch.tensor([9.0, -9.0, 4.0]))
    assert torch.equal(_ours(logits, mask, 2)[0], _ours(other, mask, 2)[0])
