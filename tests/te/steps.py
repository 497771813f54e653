"""Training steps with Transformer Engine's modules and with local ones, from the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig, RunConfig
from moiie_megatron.data.encode.encoder import IGNORE, Encoded
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.packing import PackingSpec, pack
from moiie_megatron.evaluation.layout_equivalence import record_step
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from tests.parity.tiny import language, run_config

IMAGE_TOKENS = 16
RATES = {"vision": 1e-3, "connector": 1e-3, "language": 1e-3, "moe": 1e-3}
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
    config = run_config(language(family, num_layers=2), moe)
    stage = config.stage.model_copy(update={"learning_rates": RATES})
    optimizer = config.optimizer.model_copy(update={"epsilon": 1e-3})
    return config.model_copy(update={"stage": stage, "optimizer": optimizer} | changes)


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
    """Random full tensors, the same for every model that has a tensor of this name and shape."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        record = record_step(config, context, [padded()], None)
        assert record is not None, "make the weights on one process"
        self.shapes = {
            name.removeprefix("start/"): tuple(value.shape)
            for name, value in record.items()
            if name.startswith("start/")
        }

    def __call__(self, name: str, expert: int | None) -> Tensor:
        shape = self.shapes[name][0 if expert is None else 1 :]
        seed = int(hashlib.md5(f"{name} {expert}".encode()).hexdigest()[:8], 16)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        return 1 + values if "norm" in name and name.endswith("weight") else values
