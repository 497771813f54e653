"""One MoE layer against the reference: outputs, router scores, all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.layer import MoIIELayer
from tests.parity import golden
from tests.parity.blocks import BLOCKS, build_layer, reference_names


@pytest.mark.parametrize("dispatcher", ["moiie", "alltoall", "allgather"])
@pytest.mark.parametrize(("name", "moe", "run"), BLOCKS, ids=[f"{b[0]}-{b[2]}" for b in BLOCKS])
def test_block(
    name: str, moe: dict[str, object], run: str, dispatcher: str, context: ParallelContext
) -> None:
    data, digests = golden.tensors(name), golden.numbers(name)[run]
    layer, case = build_layer(moe, dispatcher, context), run.split(".")[0]
    names = reference_names(layer)
    stored = {n.removeprefix("weights.") for n in data if n.startswith("weights.")}
    assert set(names) == stored and set(names) == set(digests)
    with torch.no_grad():
        for reference, ours in names.items():
            value = ours[0][ours[1]] if isinstance(ours, tuple) else ours
            value.copy_(data[f"weights.{reference}"])

    hidden = data[f"{case}.hidden_states"].clone().requires_grad_()  # (b, s, h)
    types = data.get(f"{case}.token_type_ids", torch.zeros(2, 24)).to(torch.int8)
    output, _ = layer(hidden.transpose(0, 1).contiguous(), padding_mask=types)
    output = output.transpose(0, 1)
    golden.assert_close(output, data[f"{run}.output"], "output")
    _check_scores(layer, hidden.detach(), types, data, run)

    (output * data[f"{case}.upstream_grad"]).sum().backward()
    golden.assert_close(hidden.grad, data[f"{run}.grad.hidden_states"], "grad hidden_states")
    for reference, ours in names.items():
        grad = ours[0].grad[ours[1]] if isinstance(ours, tuple) else ours.grad
        golden.assert_digest(grad, digests[reference], reference)


def _check_scores(
    layer: MoIIELayer, hidden: Tensor, types: Tensor, data: dict[str, Tensor], run: str
) -> None:
    """Each token's row of the joint scores: its own router's logits, -inf elsewhere."""
    scores = layer.router.choose(hidden.flatten(0, 1), types.flatten()).scores_TE
    is_image = types.flatten() == IMAGE
    rows = {"vision": is_image, "text": ~is_image, "joint": torch.ones_like(is_image)}
    stored = {"vision": "vis_router_logits", "text": "lan_router_logits", "joint": "router_logits"}
    for router in layer.router.layout.routers:
        allowed = layer.router.layout.allowed(router)
        own = scores[rows[router]]
        want = data[f"{run}.{stored[router]}"]
        golden.assert_close(own[:, allowed.start : allowed.stop], want, f"{router} scores")
        forbidden = [e for e in range(own.shape[1]) if e not in allowed]
        assert torch.isneginf(own[:, forbidden]).all()
