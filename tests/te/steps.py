"""Training steps with Transformer Engine's modules and with local ones, from the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from moiie_megatron.checkpoint.save_load import sharding_metadata
from moiie_megatron.config.model_schema import LongRope
from moiie_megatron.config.schema import MoEConfig, RunConfig
from moiie_megatron.convert.fill_model import fill_model
from moiie_megatron.data.encode.encoder import IGNORE, Encoded
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.example import Example
from moiie_megatron.evaluation.layout_equivalence import differences, record_step
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore import config as mcore_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks
from tests.parity.tiny import language, run_config

IMAGE_TOKENS = 16
RATES = {"vision": 1e-3, "connector": 1e-3, "language": 1e-3, "moe": 1e-3}
# Families whose attention has what others lack; a window shorter than the rows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {
        "longrope": LongRope(
            short_factor=[1.0] * 8,
            long_factor=[2.0] * 8,
            factor=4.0,
            original_max_position_embeddings=32,
        )
    },
    "mistral": {"num_query_groups": 2, "sliding_window": 20},
    "qwen2": {"num_query_groups": 2, "qkv_bias": True},
    "qwen3": {"num_query_groups": 2, "qk_norm": True, "head_dim": 8},
}
# In fp32 only the order of sums differs, which Adam amplifies where gradients are small.
EXACT = {"loss": 1e-5, "eval_loss": 1e-5, "aux": 1e-5, "grad": 1e-4, "next": 1e-3}
# What the samples are made of: so many text tokens, or one image.
SAMPLES: dict[str, list[int | str]] = {
    "text": [9],
    "image": [2, "image", 7],
    "two images": [3, "image", "image", 4, 5],
    "two turns": [1, "image", 5, "image", 8],
    "short": [3],
}


def tiny_config(family: str = "llama", **changes: Any) -> RunConfig:
    """A run of the tiny model with experts in every second layer; all parts train.

    Adam with its usual epsilon turns gradients that are zero up to rounding (a bias of keys does
    not change the softmax) into whole updates, which are noise.
    """
    moe = MoEConfig(num_vision_experts=1, num_shared_experts=2, num_text_experts=1)
    config = run_config(language(family, num_layers=2, **FAMILIES[family]), moe)
    stage = config.stage.model_copy(update={"learning_rates": RATES})
    optimizer = config.optimizer.model_copy(update={"epsilon": 1e-3})
    return config.model_copy(update={"stage": stage, "optimizer": optimizer} | changes)


@contextmanager
def fused_weight_gradients() -> Iterator[None]:
    """Within the block models add them up inside the matrix product, as they do on GPUs."""
    with patch.object(mcore_config, "_fuses_weight_gradients", lambda d: d.transformer_engine):
        yield


def with_section(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    """The same run with some keys of a section changed."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def _example(name: str) -> Example:
    generator = torch.Generator().manual_seed(len(name))
    tokens, types, images = [], [], []
    for part in SAMPLES[name]:
        if part == "image":
            shape = (3, 28, 28)
            images.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
            tokens.append(torch.full((IMAGE_TOKENS,), 1000))  # outside the vocabulary
            types += [IMAGE] * IMAGE_TOKENS
        else:
            assert isinstance(part, int)
            tokens.append(torch.randint(0, 256, (part,), generator=generator))
            types += [TEXT] * part
    ids, kinds = torch.cat(tokens), torch.tensor(types, dtype=torch.int8)
    labels = torch.cat([ids[1:], torch.tensor([IGNORE])])
    labels[torch.cat([kinds[1:], kinds[:1]]) == IMAGE] = IGNORE
    pixels = torch.stack(images) if images else torch.empty(0, 3, 28, 28, dtype=torch.uint8)
    return Example(Encoded(ids, labels, kinds, ()), pixels, name)


def padded(names: Sequence[str] = tuple(SAMPLES), multiple_of: int = 1) -> Batch:
    """Samples as the rows of one micro-batch."""
    examples = [_example(name) for name in names]
    return collate(examples, pad_id=0, num_image_tokens=IMAGE_TOKENS, multiple_of=multiple_of)


def packed(names: Sequence[str] = tuple(SAMPLES)) -> list[Batch]:
    """Samples in packed rows, one per micro-batch."""
    shape = PackingSpec(96, 48, IMAGE_TOKENS, pad_id=0, multiple_of=8)
    return pack([_example(name) for name in names], shape)


class Weights:
    """Random full tensors, the same for every model that has a tensor of this name and shape.

    Every rank of a job makes one.
    """

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        state = build_chunks(config, context).sharded_state_dict(
            metadata=sharding_metadata(context)
        )
        shapes = {}
        for entry in state.values():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                is_factory = isinstance(entry, ShardedTensorFactory)
                for shard in entry.build() if is_factory else [entry]:
                    shapes[shard.key] = tuple(shard.global_shape)
        of_ranks: list[dict[str, tuple[int, ...]]] = [{} for _ in range(context.size)]
        dist.all_gather_object(of_ranks, shapes)
        self.shapes = {name: shape for one in of_ranks for name, shape in one.items()}

    def __call__(self, name: str, expert: int | None) -> Tensor:
        shape = self.shapes[name][0 if expert is None else 1 :]
        seed = int(hashlib.md5(f"{name} {expert}".encode()).hexdigest()[:8], 16)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        return 1 + values if "norm" in name and name.endswith("weight") else values


def take_step(
    config: RunConfig, context: ParallelContext, batches: list[Batch]
) -> dict[str, Tensor]:
    """One recorded step of one process, from the same weights for every context."""
    record = record_step(config, context, batches, Weights(config, context))
    assert record is not None
    assert sum(name.startswith("grad/") for name in record) > 2
    return record


def disagreement(
    got: dict[str, Tensor], want: dict[str, Tensor], limits: dict[str, float] = EXACT
) -> dict[str, tuple[float, str]]:
    """The kinds of tensors that differ by more than their limit: by how much, and which does."""
    worst = differences(got, want)
    return {kind: worst[kind] for kind, limit in limits.items() if not worst[kind][0] <= limit}


def course(
    config: RunConfig, context: ParallelContext, steps: Sequence[list[Batch]]
) -> list[tuple[float, float]]:
    """Loss and gradient norm of training steps, each on this rank's micro-batches."""
    model = build_chunks(config, context)
    assert fill_model(model, Weights(config, context)) == []
    state = prepare_training(config, context, model, steps=10)
    state.model.train()
    results = [train_step(config, context, state, batches) for batches in steps]
    assert all(result.updated for result in results)
    return [(result.lm_loss, result.grad_norm) for result in results]
