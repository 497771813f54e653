"""Whole models against the reference: logits, loss, balance losses, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig, RunConfig
from moiie_megatron.convert.load_pretrained import load_pretrained
from moiie_megatron.families.weight_map import language_rows
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.model import MoIIEModel
from tests.parity import golden, tiny

FAMILIES = ("llama", "phi3")
CASES = ("ones", "pad")
MOE_LAYERS = (1, 3)
COEFFS = {"vision": 0.05, "text": 0.03}  # the reference's, in golden config.json


def _moiie(family: str, context: ParallelContext, aux: str) -> tuple[MoIIEModel, RunConfig]:
    """The golden model without balance losses, with ``per_layer`` or with ``pooled`` ones.  The
    data sums the per-layer losses of layers; our alpha weighs their mean, so it is the
    coefficient times the number of MoE layers."""
    times = {"none": 0, "per_layer": len(MOE_LAYERS), "pooled": 1}[aux]
    moe = MoEConfig(
        aux_loss="pooled" if aux == "pooled" else "per_layer",
        vision_aux_loss_coeff=COEFFS["vision"] * times,
        text_aux_loss_coeff=COEFFS["text"] * times,
    )
    directory = str(golden.ROOT / f"tiny_{family}_moiie")
    config = tiny.run_config(tiny.language(family, pretrained=directory), moe)
    model = tiny.build(config, context)
    left = load_pretrained(model, config)
    assert left and all(name.startswith(("vision_encoder.", "connector.")) for name in left)
    return model, config


def _gradients(model: MoIIEModel, config: RunConfig) -> dict[str, Tensor]:
    """Gradients of the language model under their Hugging Face names, by the name table."""
    parameters = {
        entry.key: entry.data
        for entry in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    gradients = {}
    for row in language_rows(config.language, config.moe.layout, config.moe_layers):
        grad = parameters[row.megatron].grad
        grad = grad if row.expert is None else grad[row.expert]
        gradients |= dict(zip(row.hf, row.transform.to_hf(grad), strict=True))
    return gradients


def _real(inputs: dict[str, Tensor], case: str) -> Tensor:
    """Where logits are defined: the reference lets padding attend to nothing after the text, we
    let it attend to what stands before it."""
    return inputs[f"{case}.attention_mask"].bool()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient_of_the_language_loss(
    family: str, case: str, context: ParallelContext
) -> None:
    inputs = golden.tensors(f"tiny_{family}_moiie/inputs")
    want = golden.tensors(f"tiny_{family}_moiie/outputs")
    runs = golden.numbers(f"tiny_{family}_moiie/outputs")[case]
    model, config = _moiie(family, context, "none")
    real = _real(inputs, case)

    logits = tiny.forward(model, inputs, case)
    golden.assert_close(logits[real], want[f"{case}.logits"][real], "logits")
    loss = tiny.forward(model, inputs, case, labels=True)
    golden.assert_close(loss, want[f"{case}.losses"][0], "loss")

    loss.backward()
    gradients = _gradients(model, config)
    assert set(gradients) == set(runs["grad_lm_only_digests"])
    for name, digest in runs["grad_lm_only_digests"].items():
        golden.assert_digest(gradients[name], digest, name)
    routers = {n: t for n, t in want.items() if n.startswith(f"{case}.grad_lm_only.")}
    assert len(routers) == 4
    for name, grad in routers.items():
        golden.assert_close(gradients[name.removeprefix(f"{case}.grad_lm_only.")], grad, name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_balance_losses_and_their_gradients(
    family: str, case: str, context: ParallelContext
) -> None:
    inputs = golden.tensors(f"tiny_{family}_moiie/inputs")
    want = golden.tensors(f"tiny_{family}_moiie/outputs")
    runs = golden.numbers(f"tiny_{family}_moiie/outputs")[case]
    model, config = _moiie(family, context, "per_layer")
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))

    tiny.forward(model, inputs, case, labels=True).backward()
    for index, layer in enumerate(MOE_LAYERS):
        stats = model.language_model.decoder.layers[layer].mlp.router.stats
        stats.add_up()
        per_layer = torch.tensor([runs[f"aux_loss_{r}_per_layer"][index] for r in ("vis", "lan")])
        golden.assert_close(stats.aux_G.float(), per_layer, f"balance losses of layer {layer}")

    gradients = _gradients(model, config)
    start = f"{case}.grad_perlayer_sum_aux."
    routers = {n.removeprefix(start): t for n, t in want.items() if n.startswith(start)}
    assert len(routers) == 4
    for name, grad in routers.items():
        golden.assert_close(gradients[name], grad, name)
        without = want[f"{case}.grad_lm_only.{name}"]
        assert not torch.allclose(grad, without, rtol=1e-2), "the data shows no balance loss"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_balance_losses_and_every_gradient(
    family: str, case: str, recompute: bool, context: ParallelContext
) -> None:
    """The reference's exact total loss, also when every layer is computed twice."""
    inputs = golden.tensors(f"tiny_{family}_moiie/inputs")
    want = golden.tensors(f"tiny_{family}_moiie/outputs")
    runs = golden.numbers(f"tiny_{family}_moiie/outputs")[case]
    model, config = _moiie(family, context, "pooled")
    if recompute:
        model.config.recompute_granularity = "full"
        model.config.recompute_method = "uniform"
        model.config.recompute_num_layers = 1
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    tiny.forward(model, inputs, case, labels=True).backward()

    logged = torch.zeros(2, dtype=torch.float64)
    for layer in MOE_LAYERS:
        logged += model.language_model.decoder.layers[layer].mlp.router.stats.aux_G
    golden.assert_close(
        logged.float() / len(MOE_LAYERS), want[f"{case}.losses"][1:3], "pooled losses"
    )
    gradients = _gradients(model, config)
    for name, digest in runs["grad_digests"].items():
        golden.assert_digest(gradients[name], digest, name)
    start = f"{case}.grad."
    routers = {n.removeprefix(start): t for n, t in want.items() if n.startswith(start)}
    assert len(routers) == 4
    for name, grad in routers.items():
        golden.assert_close(gradients[name], grad, name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense(family: str, case: str, context: ParallelContext, tmp_path: Path) -> None:
    inputs = golden.tensors(f"tiny_{family}_moiie/inputs")
    want = golden.tensors(f"tiny_{family}_dense/outputs")
    directory = str(golden.dense_directory(family, tmp_path / "dense"))
    config = tiny.run_config(tiny.language(family, pretrained=directory))
    model = tiny.build(config, context)
    load_pretrained(model, config)
    real = _real(inputs, case)
    logits = tiny.forward(model, inputs, case)
    golden.assert_close(logits[real], want[f"{case}.logits"][real], "logits")
    loss = tiny.forward(model, inputs, case, labels=True)
    golden.assert_close(loss, want[f"{case}.loss"][0], "loss")


VARIANTS = [
    {"variant": "vanilla"},
    {"variant": "modality"},
    {"variant": "moiie"},
    {"variant": "moiie", "num_vision_experts": 2, "num_shared_experts": 4, "num_text_experts": 2},
    {"variant": "moiie", "layers": "all", "top_k": 3},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("moe", VARIANTS, ids=lambda moe: "-".join(map(str, moe.values())))
def test_upcycled_equals_dense(
    family: str, moe: dict[str, object], context: ParallelContext, tmp_path: Path
) -> None:
    """Every expert is the dense FFN and the weights of a token's experts add up to one, so the
    routers (here far from uniform) do not matter.  1e-5 at logits up to 4: rounding alone; the
    reference itself shows 1.7e-6."""
    inputs = golden.tensors(f"tiny_{family}_moiie/inputs")
    want = golden.tensors(f"tiny_{family}_dense/outputs")["ones.logits"]
    directory = str(golden.dense_directory(family, tmp_path / "dense"))
    section = MoEConfig(**moe, router_init_std=0.3)
    config = tiny.run_config(tiny.language(family, pretrained=directory), section)
    model = tiny.build(config, context)
    left = [n for n in load_pretrained(model, config) if n.startswith("language_model.")]
    assert len(left) == len(config.moe_layers) * len(section.layout.routers)
    assert all(".mlp.router.gates." in name for name in left)
    with torch.no_grad():
        logits = tiny.forward(model, inputs, "ones")
    assert (logits - want).abs().max() < 1e-5
