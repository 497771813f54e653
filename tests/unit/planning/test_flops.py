"""The FLOPs of a step against those that torch counts in the products of a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moiie_megatron.config.model_schema import MoEConfig, VisionConfig
from moiie_megatron.config.schema import Part, RunConfig
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.planning.flops import Work, model_flops
from moiie_megatron.selftest.checks.models import example, tiny_config
from moiie_megatron.training.stages import PARTS, apply_stage
from moiie_megatron.training.step import count_tokens, forward_inputs
from moiie_megatron.vlm.build import build_chunks

TEXT_ONLY = [(30, 0), (30, 0)]
IMAGES = [(30, 1), (14, 2)]  # text tokens and images of a sample; equally long
CLIP = {"family": "clip", "activation": "quick_gelu"}


def run_config(trained: Sequence[Part], *, moe: bool = True, **vision: object) -> RunConfig:
    """Two layers, the vision tower's third one is not run."""
    config = tiny_config(1, "fp32")
    stage = config.stage.model_copy(
        update={"learning_rates": dict.fromkeys(trained, 1e-3), "moe": moe}
    )
    tower = VisionConfig(**(config.vision.model_dump() | {"num_layers": 3} | vision))
    changes = {"stage": stage, "vision": tower} | (
        {} if moe else {"moe": MoEConfig(variant="dense")}
    )
    return config.model_copy(update=changes)


def batch_of(config: RunConfig, samples: Sequence[tuple[int, int]], *, packed: bool) -> Batch:
    """A micro-batch of these texts and images; padded if they are not equally long."""
    generator = torch.Generator().manual_seed(1)
    examples = [example(generator, text, images, config) for text, images in samples]
    image_tokens = config.vision.num_image_tokens
    if packed:
        is_padded = len({len(one.encoded.tokens) for one in examples}) > 1
        spec = PackingSpec(128, 64, image_tokens, pad_id=0, pad_to_capacity=is_padded)
        (row,) = pack(examples, spec)
        return row
    return collate(examples, pad_id=0, num_image_tokens=image_tokens)


def counted(config: RunConfig, context: ParallelContext, batch: Batch) -> tuple[int, int]:
    """FLOPs of the products of forward and backward pass: of the routers, and of all others."""
    chunks = build_chunks(config, context)
    apply_stage(chunks, config.stage)
    (model,) = chunks
    inputs = forward_inputs(config, batch, context, model)
    # Fused attention is an operator that torch does not count on the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs).sum().backward()
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    routers = sum(flops for name, flops in by_module.items() if name.endswith(".mlp.router"))
    others = by_module["Global"] - routers
    if not len(batch.images):  # a blank patch has run instead, which is no work
        others -= sum(by_module.get(f"MoIIEModel.{x}", 0) for x in ("vision_encoder", "connector"))
    return routers, others


@pytest.mark.parametrize("samples", [TEXT_ONLY, IMAGES], ids=["text", "images"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "config",
    [
        run_config(PARTS),
        run_config(["connector", "language", "moe"]),
        run_config(["vision", "language", "moe"], **CLIP),
        run_config(["moe"]),
        run_config(["vision", "connector", "language"], moe=False),
        run_config(["connector"], moe=False, **CLIP),
    ],
    ids=lambda config: "-".join(config.stage.learning_rates),
)
def test_against_the_counter(
    config: RunConfig,
    packed: bool,
    samples: list[tuple[int, int]],
    context: ParallelContext,
) -> None:
    batch = batch_of(config, samples, packed=packed)
    counts = count_tokens([batch], context)
    images = sum(images for _, images in samples)
    flops = model_flops(config)
    ours = flops.of(Work(counts.tokens, counts.labels, images, counts.squared_lengths))
    # Three gates for each of two modalities, in two layers: not those the router's kernels compute.
    gates = counts.tokens * 2 * 6 * 64 * 6 if config.has_experts else 0
    routers, others = counted(config, context, batch)
    # The counter takes attention for twice what the causal mask leaves.
    attention = counts.squared_lengths * flops.per_squared_length
    assert ours - gates + attention == pytest.approx(others, rel=1e-6)
    assert routers < 0.01 * others


@pytest.mark.parametrize(("packed", "positions"), [(False, 2 * 60), (True, 128)])
def test_padding_is_not_work(packed: bool, positions: int, context: ParallelContext) -> None:
    config = run_config(PARTS)
    batch = batch_of(config, [(60, 0), (5, 3)], packed=packed)
    counts = count_tokens([batch, batch], context)
    assert counts.positions == 2 * positions and counts.tokens == 2 * (60 + 53)
    assert counts.squared_lengths == 2 * (60**2 + 53**2)
    assert counts.labels == 2 * (59 + 4) and counts.image_tokens == 2 * 3 * 16
