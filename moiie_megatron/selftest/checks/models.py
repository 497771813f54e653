"""Models, weights and micro-batches of the self-test: the same numbers on every device and layout.

Initial values depend on the device that draws them.  The weights here are drawn on the CPU, each
from its name, and are exact in bf16, so that runs in either precision start from the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from moiie_megatron.config.schema import (
    DataConfig,
    LanguageConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    VisionConfig,
)
from moiie_megatron.convert.fill_model import Get
from moiie_megatron.data.encode.encoder import IGNORE, Encoded
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.example import Example
from moiie_megatron.families.weight_map import model_rows
from moiie_megatron.layout.token_types import IMAGE, TEXT

Precision = Literal["fp32", "bf16"]

NUM_EXPERTS = 4
SEQUENCE_LENGTH = 64
_ROUTER_STD = 0.3  # wide, so that rounding does not change the chosen experts


def expert_parallel(ranks: int) -> int:
    """The degree of expert parallelism: as many ranks as share the experts evenly."""
    return next(degree for degree in (NUM_EXPERTS, 2, 1) if ranks % degree == 0)


def tiny_language() -> LanguageConfig:
    """Llama's architecture at two layers."""
    return LanguageConfig(
        family="llama",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=512,
        max_position_embeddings=512,
    )


def tiny_vision() -> VisionConfig:
    """SigLIP's architecture at two layers: 16 image tokens."""
    return VisionConfig(
        family="siglip",
        hidden_size=64,
        ffn_hidden_size=128,
        num_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        activation="gelu_pytorch_tanh",
    )


def tiny_config(ranks: int, precision: Precision, *, packing: bool = False) -> RunConfig:
    """A MoIIE model of two layers of which both have experts; everything trains.

    Learning rates and balance weights are large on purpose: errors show at once.
    """
    return RunConfig(
        output="unused",
        language=tiny_language(),
        vision=tiny_vision(),
        moe=MoEConfig(
            layers="all",
            vision_aux_loss_coeff=0.05,
            text_aux_loss_coeff=0.05,
            z_loss_coeff=0.01,
        ),
        parallel=ParallelConfig(expert=expert_parallel(ranks)),
        stage=StageConfig(
            name="joint",
            moe=True,
            learning_rates=dict.fromkeys(("vision", "connector", "language", "moe"), 1e-3),
            template="phi3",
            image_mode="square",
        ),
        data=DataConfig(
            sources=[], tokenizer="unused", sequence_length=SEQUENCE_LENGTH, packing=packing
        ),
        # Adam divides by |g| + epsilon, which with the usual epsilon turns the rounding error of
        # a gradient that is zero into a step as large as any other.
        optimizer=OptimizerConfig(epsilon=1e-3),
        train=TrainConfig(
            global_batch_size=6 * ranks, micro_batch_size=2, steps=10, precision=precision
        ),
    )


def seeded_weights(config: RunConfig) -> Get:
    """Every full tensor of a model, from its name alone, as ``fill_model`` asks for them."""
    shapes = {(row.megatron, row.expert): row.full_shape for row in model_rows(config)}

    def get(name: str, expert: int | None) -> Tensor:
        shape = shapes[name, expert]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {expert}".encode()))
        values = torch.randn(shape, generator=generator)
        if ".router." in name:
            values *= _ROUTER_STD
        elif len(shape) > 1:
            values *= shape[-1] ** -0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        return values.bfloat16().float()

    return get


def example(generator: torch.Generator, text: int, images: int, config: RunConfig) -> Example:
    """Random token ids behind random pictures; the model learns all of the text."""
    vision, front = config.vision, images * config.vision.num_image_tokens
    tokens = torch.randint(config.language.vocab_size, (front + text,), generator=generator)
    types = torch.full(tokens.shape, TEXT, dtype=torch.int8)
    types[:front] = IMAGE
    labels = torch.cat([tokens[1:], torch.tensor([IGNORE])])
    labels[:front] = IGNORE
    shape = (images, 3, vision.image_size, vision.image_size)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Example(Encoded(tokens, labels, types, ()), pixels, "random")


# Text tokens and images of the two samples of a micro-batch: images with hardly any text, text
# alone, both.
_KINDS = (((3, 2), (3, 1)), ((40, 0), (25, 0)), ((30, 1), (12, 2)))


def _micro_batches(config: RunConfig, count: int) -> Iterator[Batch]:
    num_image_tokens = config.vision.num_image_tokens
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        samples = [
            example(generator, text, images, config)
            for text, images in _KINDS[number % len(_KINDS)]
        ]
        if config.data.packing:
            capacity = config.micro_batch_shape[1]
            (row,) = pack(samples, PackingSpec(capacity, SEQUENCE_LENGTH, num_image_tokens, 0))
            yield row
        else:
            yield collate(samples, pad_id=0, num_image_tokens=num_image_tokens)


def micro_batches(config: RunConfig, ranks: int, rank: int, size: int) -> list[Batch]:
    """The micro-batches of one data-parallel rank of ``size``, three for each of ``ranks``.

    Neighbouring ranks have different kinds at the same time.  One rank of one has all of them.
    """
    return list(_micro_batches(config, len(_KINDS) * ranks))[rank::size]
