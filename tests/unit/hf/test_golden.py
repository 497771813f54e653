"""The exported model against the reference's numbers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from moiie_megatron.hf.configuration_moiie import MoiieConfig
from moiie_megatron.hf.language_moiie import MoiieSparseMLP, MoiieTopK
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from tests.parity import golden
from tests.unit.hf import tiny

FAMILIES = ("llama", "phi3")
CASES = ("ones", "pad")


def put_experts(prefix: str, names: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Stack the reference's experts under ``prefix``, in either family's names."""
    count = 1 + max(int(n.split("experts.")[1].split(".")[0]) for n in names if "experts." in n)
    stacked: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for i in range(count):
        expert = f"{prefix}experts.{i}."
        fused = names.get(f"{expert}gate_up_proj.weight")
        if fused is None:
            fused = torch.cat([names[f"{expert}{n}_proj.weight"] for n in ("gate", "up")])
        stacked["gate_up_proj"].append(fused)
        stacked["down_proj"].append(names[f"{expert}down_proj.weight"])
    target |= {f"{prefix}experts.{name}": torch.stack(parts) for name, parts in stacked.items()}


def golden_model(family: str, weights: dict[str, Tensor], **changes: object) -> torch.nn.Module:
    """The text side of a golden model; the data brings its image features along."""
    theirs = json.loads((golden.ROOT / f"tiny_{family}_moiie" / "config.json").read_text())
    text = {n: v for n, v in theirs.items() if n in tiny.text(family) or n == "rope_theta"}
    values = {
        "text_config": text | {"model_type": family},
        "vision_config": tiny.vision("siglip"),
        "experts": {"vision": 1, "shared": 2, "text": 1},
        "num_experts_per_tok": theirs["num_experts_per_tok"],
        "moe_layers": theirs["moe_layers"],
        "image_token_id": theirs["vocab_size"],
    }
    config = MoiieConfig(**(values | changes))
    model = MoiieForConditionalGeneration(config).eval()
    ours: dict[str, Tensor] = {}
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.mlp."
        put_experts(prefix, {n: t for n, t in weights.items() if n.startswith(prefix)}, ours)
    ours |= {n: t for n, t in weights.items() if ".experts." not in n}
    ours = {n.replace("model.", "model.language_model.", 1): t for n, t in ours.items()}
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected
    assert all("vision_tower" in n or "multi_modal_projector" in n for n in missing)
    return model


def forward(model: torch.nn.Module, inputs: dict[str, Tensor], case: str, **more: object):
    return model(
        inputs_embeds=inputs[f"{case}.inputs_embeds"],
        attention_mask=inputs[f"{case}.attention_mask"],
        mm_token_type_ids=inputs[f"{case}.token_type_ids"],
        **more,
    )


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_loss(family: str, case: str, experts: str) -> None:
    inputs = golden.tensors(f"tiny_{family}_moiie/inputs")
    want = golden.tensors(f"tiny_{family}_moiie/outputs")
    model = golden_model(family, golden.tensors(f"tiny_{family}_moiie/model"))
    model.set_experts_implementation(experts)
    output = forward(model, inputs, case, labels=inputs[f"{case}.labels"])
    real = inputs[f"{case}.attention_mask"].bool()
    golden.assert_close(output.logits[real], want[f"{case}.logits"][real], "logits")
    golden.assert_close(output.loss, want[f"{case}.losses"][0], "loss")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dense(family: str) -> None:
    inputs = golden.tensors(f"tiny_{family}_moiie/inputs")
    want = golden.tensors(f"tiny_{family}_dense/outputs")
    weights = golden.tensors(f"tiny_{family}_moiie/model")
    experts = (".mlp.experts.", ".mlp.gate.", ".mlp.gate_vis.")
    weights = {n: t for n, t in weights.items() if not any(e in n for e in experts)}
    weights |= golden.tensors(f"tiny_{family}_dense/odd_layer_ffn")
    model = golden_model(family, weights, moe_layers=[], experts=None)
    golden.assert_close(forward(model, inputs, "ones").logits, want["ones.logits"], "logits")


@torch.no_grad()
def test_reference_mask_is_a_shift_of_the_types() -> None:
    """The last image token of each run is text: the same as types that say so, and not the same
    as the paper's rule."""
    inputs = golden.tensors("tiny_llama_moiie/inputs")
    weights = golden.tensors("tiny_llama_moiie/model")
    types = inputs["ones.token_type_ids"]
    shifted = types.clone()
    for row in range(types.shape[0]):
        for i in range(types.shape[1]):
            is_last = i + 1 == types.shape[1] or types[row, i + 1] == 0
            if types[row, i] == 1 and is_last:
                shifted[row, i] = 0
    assert 0 < shifted.sum() < types.sum()
    plain = golden_model("llama", weights)
    quirky = golden_model("llama", weights, last_image_token_as_text=True)
    want = forward(plain, inputs | {"ones.token_type_ids": shifted}, "ones").logits
    got = forward(quirky, inputs, "ones").logits
    assert torch.equal(got, want)
    assert (got - forward(plain, inputs, "ones").logits).abs().max() > 1e-2


BLOCKS = [
    ("moiie_block_e4", (1, 2, 1), "single.plain"),
    ("moiie_block_e4", (1, 2, 1), "multi.plain"),
    ("moiie_block_e4", (1, 2, 1), "text_only.plain"),
    ("moiie_block_e4", (1, 2, 1), "image_only.plain"),
    ("moiie_block_e8", (2, 4, 2), "single.plain"),
    ("vanilla_block", (0, 4, 0), "single.all"),
    ("modality_block_v2l2", (2, 0, 2), "single.plain"),
]


@pytest.mark.parametrize(("name", "sizes", "run"), BLOCKS, ids=[f"{b[0]}-{b[2]}" for b in BLOCKS])
@torch.no_grad()
def test_one_block(name: str, sizes: tuple[int, int, int], run: str) -> None:
    data = golden.tensors(name)
    experts = dict(zip(("vision", "shared", "text"), sizes, strict=True))
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = tiny.config("phi3", text_config=text, experts=experts)
    config.text_config._experts_implementation = "grouped_mm"
    block = MoiieSparseMLP(config.text_config, config)
    theirs = {n.removeprefix("weights."): t for n, t in data.items() if n.startswith("weights.")}
    for group, first in (("vis_experts", 0), ("lan_experts", sizes[0])):  # Modality MoE's names
        for name_ in [n for n in theirs if n.startswith(group)]:
            _, i, rest = name_.split(".", 2)
            theirs[f"experts.{first + int(i)}.{rest}"] = theirs.pop(name_)
    ours = {n: t for n, t in theirs.items() if n.startswith("gate")}
    put_experts("", theirs, ours)
    block.load_state_dict(ours)

    case = run.split(".")[0]
    hidden = data[f"{case}.hidden_states"]
    is_image = data.get(f"{case}.token_type_ids", torch.zeros(hidden.shape[:2])) == 1
    scores: list[Tensor] = []
    top_k = next(m for m in block.modules() if isinstance(m, MoiieTopK))
    top_k.register_forward_hook(lambda module, args, output: scores.append(output[0]))
    golden.assert_close(block(hidden, is_image), data[f"{run}.output"], "output")
    rows = {"vis_router_logits": is_image, "lan_router_logits": ~is_image}
    allowed = {"vis_router_logits": "gate_vis", "lan_router_logits": "gate"}
    if len(config.routers) == 1:
        rows, allowed = {"router_logits": is_image | True}, {"router_logits": "gate"}
    for stored, which in rows.items():
        ids = config.routers[allowed[stored]]
        own = scores[0][which.flatten()]
        golden.assert_close(own[:, ids.start : ids.stop], data[f"{run}.{stored}"], stored)
        forbidden = [e for e in range(config.num_experts) if e not in ids]
        assert torch.isneginf(own[:, forbidden]).all()
