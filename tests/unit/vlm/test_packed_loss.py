"""A sample has the same loss in a packed row as alone: images, labels and token types included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig
from moiie_megatron.data.encode.encoder import IGNORE, Encoded
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.example import Example
from moiie_megatron.evaluation.layout_equivalence import differences
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.step import forward_inputs
from moiie_megatron.vlm.model import MoIIEModel
from tests.parity.tiny import build, language, run_config

IMAGE_TOKENS = 16
# What the samples are made of: so many text tokens, or one image.
PARTS = {
    "text": [9],
    "image": [2, "image", 7],
    "two images": [3, "image", "image", 4, 5],
    "image first": ["image", 6],
    "two turns": [1, "image", 5, "image", 8],
    "short": [3],
}


def example(name: str) -> Example:
    tokens, types, images = [], [], []
    for part in PARTS[name]:
        if part == "image":
            images.append(torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8))
            tokens.append(torch.full((IMAGE_TOKENS,), 1000))  # outside the vocabulary
            types += [IMAGE] * IMAGE_TOKENS
        else:
            assert isinstance(part, int)
            tokens.append(torch.randint(0, 256, (part,)))
            types += [TEXT] * part
    ids, kinds = torch.cat(tokens), torch.tensor(types, dtype=torch.int8)
    labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
    labels[torch.cat([kinds[1:], kinds[:1]]) == IMAGE] = IGNORE
    pixels = torch.stack(images) if images else torch.empty(0, 3, 28, 28, dtype=torch.uint8)
    return Example(Encoded(ids, labels, kinds, ()), pixels, name)


def gradients(model: MoIIEModel) -> dict[str, Tensor]:
    """Of all parameters that have one (the last vision layer is not used)."""
    named = model.named_parameters()
    return {f"grad/{name}": p.grad.clone() for name, p in named if p.grad is not None}


def losses(model: MoIIEModel, context: ParallelContext, batches: list[Batch]) -> dict[str, Tensor]:
    """Summed loss by sample; the gradients of all of them stay in the model."""
    model.zero_grad()
    found: dict[str, Tensor] = {}
    for batch in batches:
        loss = model(**forward_inputs(CONFIG, batch, context, model))
        loss.sum().backward()
        if batch.cu_seqlens is None:
            parts = dict(zip(batch.record_ids, loss, strict=True))
        else:
            sizes = batch.cu_seqlens.diff().tolist()
            # Padding, if any, has no name.
            parts = dict(zip(batch.record_ids, loss[0].split(sizes), strict=False))
        found |= {name: part.detach().sum() for name, part in parts.items()}
    return found


MOE = MoEConfig(num_vision_experts=1, num_shared_experts=2, num_text_experts=1)
CONFIG = run_config(language("llama"), MOE)


RECOMPUTE: dict[str, dict[str, Any]] = {
    "off": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "moe"],
    },
}

for layers in (1, 2, 4):
    RECOMPUTE[f"block of {layers}"] = {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": layers,
    }


def make_rows(examples: list[Example]) -> list[Batch]:
    shape = PackingSpec(96, 48, IMAGE_TOKENS, pad_id=0, multiple_of=8)
    rows = pack(examples, shape)
    assert len(rows) == 2 and max(len(row.record_ids) for row in rows) > 2
    assert any(len(row.images) > 2 for row in rows)
    return rows


@pytest.mark.parametrize("recompute", ["off", "full", "selective"])
def test_loss_and_gradients_by_sample(context: ParallelContext, recompute: str) -> None:
    config = CONFIG.model_copy(update={"megatron": RECOMPUTE[recompute]})
    model = build(config, context)
    # The balance losses belong to micro-batches, which are other ones here.
    for layer in model.language_model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.coeffs_G.zero_()
    torch.manual_seed(5)
    examples = [example(name) for name in PARTS]
    rows = make_rows(examples)
    alone = [collate([one], pad_id=0, num_image_tokens=IMAGE_TOKENS) for one in examples]
    padded = [collate(examples, pad_id=0, num_image_tokens=IMAGE_TOKENS)]

    got = losses(model, context, rows)
    together = gradients(model)
    assert len(together) > 50
    for batches in (alone, padded):
        wanted = losses(model, context, batches)
        assert wanted.keys() == got.keys() == PARTS.keys()
        for name, loss in wanted.items():
            assert loss > 1
            assert got[name].item() == pytest.approx(loss.item(), rel=1e-5), name
        error, name = differences(together, gradients(model))["grad"]
        assert error < 1e-4, name


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("recompute", [kind for kind in RECOMPUTE if kind != "off"])
def test_recomputation_changes_nothing(
    context: ParallelContext, recompute: str, packed: bool
) -> None:
    """Losses and gradients, balance losses included, are equal to the last bit."""
    results = []
    for kind in ("off", recompute):
        seed_everything(3, context.groups)
        config = CONFIG.model_copy(update={"megatron": RECOMPUTE[kind]})
        model = build(config, context)
        examples = [example(name) for name in PARTS]
        padded = [collate(examples, pad_id=0, num_image_tokens=IMAGE_TOKENS)]
        found = losses(model, context, make_rows(examples) if packed else padded)
        results.append(found | gradients(model))
    plain, replayed = results
    assert plain.keys() == replayed.keys() and any("gates" in name for name in plain)
    assert [name for name in plain if not torch.equal(plain[name], replayed[name])] == []
