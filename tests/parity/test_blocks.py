"""One MoE layer against the reference: outputs, router scores, all gradients."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig, ParallelConfig
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.config import transformer_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.vlm.build import moe_module
from tests.parity import golden, tiny

MOIIE_8 = {"num_vision_experts": 2, "num_shared_experts": 4, "num_text_experts": 2}
E4_CASES = ("single", "multi", "text_only", "image_only")
BLOCKS = [
    *(("moiie_block_e4", {"variant": "moiie"}, f"{case}.plain") for case in E4_CASES),
    *(("moiie_block_e8", {"variant": "moiie", **MOIIE_8}, f"{c}.plain") for c in E4_CASES[:2]),
    ("vanilla_block", {"variant": "vanilla"}, "single.all"),
    ("modality_block_v2l2", {"variant": "modality"}, "single.plain"),
]


def build_layer(
    moe: dict[str, object],
    dispatcher: str,
    context: ParallelContext,
    parallel: ParallelConfig | None = None,
) -> MoIIELayer:
    """One layer of the size of the golden blocks, in training mode."""
    section = MoEConfig(
        **moe, layers="all", dispatcher=dispatcher, vision_aux_loss_coeff=0, text_aux_loss_coeff=0
    )
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 1}
    config = tiny.run_config(
        tiny.language("phi3", **sizes), section, parallel=parallel or ParallelConfig()
    )
    layer = build_module(
        moe_module(config, context),
        config=transformer_config(config, context.device),
    )
    layer.set_layer_number(1)
    return layer.train()


def reference_names(layer: MoIIELayer) -> dict[str, Tensor]:
    """Our parameters' values and gradients are compared under the reference's names."""
    layout = layer.router.layout
    names = {}
    for router, gate in layer.router.gates.items():
        names["gate_vis.weight" if router == "vision" else "gate.weight"] = gate
    for expert in range(layout.num_experts):
        block = f"experts.{expert}"
        if layout.num_shared == 0:  # Modality MoE has two lists of experts
            text = expert - layout.num_vision
            block = f"vis_experts.{expert}" if text < 0 else f"lan_experts.{text}"
        names[f"{block}.gate_up_proj.weight"] = (layer.experts.weight_fc1, expert)
        names[f"{block}.down_proj.weight"] = (layer.experts.weight_fc2, expert)
    return names


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
    is_image = types.flatten() == IMAGE
    scores = layer.router.scores(hidden.flatten(0, 1), types.flatten())
    rows = {"vision": is_image, "text": ~is_image, "joint": torch.ones_like(is_image)}
    stored = {"vision": "vis_router_logits", "text": "lan_router_logits", "joint": "router_logits"}
    for router in layer.router.layout.routers:
        allowed = layer.router.layout.allowed(router)
        own = scores[rows[router]]
        want = data[f"{run}.{stored[router]}"]
        golden.assert_close(own[:, allowed.start : allowed.stop], want, f"{router} scores")
        forbidden = [e for e in range(own.shape[1]) if e not in allowed]
        assert torch.isneginf(own[:, forbidden]).all()
