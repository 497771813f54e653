"""Floating-point operations of a training step: arithmetic, no weights and no torch.

Counted are the products that the model needs, two operations per multiplication with a weight in
the forward pass and four in the backward pass, without recomputation ("model FLOPs", PaLM,
appendix B).  Norms, activations, routers' softmax and rotary embeddings are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.parameters import count_parameters

_PER_WEIGHT = 6  # forward 2, backward 4


@dataclass(frozen=True)
class Work:
    """What a step has to process.

    Attributes:
        segments: Length in tokens of every causally masked sequence, images included.
        labels: Tokens with a label: the output layer sees no others.
        images: Number of images.
    """

    segments: Sequence[int]
    labels: int
    images: int


def step_flops(config: RunConfig, work: Work) -> float:
    """Model FLOPs of forward and backward pass; every part counts as trained."""
    count, vision = count_parameters(config), config.vision
    per_token = count.attention + count.dense_ffn + count.active_experts + count.routers
    tokens = sum(work.segments)
    patches = work.images * vision.num_image_tokens
    width = config.language.num_attention_heads * config.language.head_size
    # Scores and their product with the values, over the half that the causal mask leaves.
    pairs = sum(length * length / 2 for length in work.segments) * config.language.num_layers
    image_pairs = patches * vision.num_image_tokens * vision.num_layers
    output = config.language.hidden_size * config.language.vocab_size
    return _PER_WEIGHT * (
        tokens * per_token
        + work.labels * output
        + patches * (count.vision + count.connector)
        + 2 * (pairs * width + image_pairs * vision.hidden_size)
    )
