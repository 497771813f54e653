"""Floating-point operations of training steps: arithmetic, no weights and no torch.

Counted are the matrix products that a step needs for its tokens ("model FLOPs", PaLM, appendix B):
without recomputation and without padding.  A product with a weight takes two operations per
weight and token in the forward pass, two for the gradient of its input, and two for the gradient
of the weight if that trains.  Norms, activations, softmax, rotary embeddings and the optimizer are
left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.families.registry import vision_family
from moiie_megatron.families.weight_map import (
    CONNECTOR,
    EMBEDDING,
    OUTPUT_LAYER,
    WeightMapping,
    model_rows,
)

_PER_WEIGHT = 2  # a multiplication and an addition


@dataclass(frozen=True)
class Work:
    """What steps have to process.

    Attributes:
        tokens: Tokens without padding, images included.
        labels: Tokens with a label: the output layer sees no others.
        images: Number of images.
        squared_lengths: Sum of the squares of the samples' lengths: attention stays within a
            sample.
    """

    tokens: int
    labels: int
    images: int
    squared_lengths: int


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of forward and backward pass for each unit of work (see ``Work``)."""

    per_token: float
    per_label: float
    per_image: float
    per_squared_length: float

    def of(self, work: Work) -> float:
        """FLOPs of that much work."""
        return (
            work.tokens * self.per_token
            + work.labels * self.per_label
            + work.images * self.per_image
            + work.squared_lengths * self.per_squared_length
        )


def model_flops(config: RunConfig) -> ModelFlops:
    """What a run's model costs, with the parts frozen that its stage does not train.

    The gradient passes through the whole decoder whatever trains, and through the vision tower
    only if that trains.
    """
    trained = config.stage.learning_rates
    rows = [row for row in model_rows(config) if _is_factor(row)]
    language, layout = config.language, config.moe.layout
    # All experts of a layer are alike, and a token runs through top-k of them.  Every router is
    # computed for every token.
    experts = _weights(rows, "experts") * layout.top_k // max(layout.num_experts, 1)
    through_moe = experts + _weights(rows, "routers")
    width = language.num_attention_heads * language.head_size
    return ModelFlops(
        per_token=_flops(_weights(rows, "language"), trains="language" in trained)
        + _flops(through_moe, trains="moe" in trained),
        per_label=_flops(language.hidden_size * language.vocab_size, trains="language" in trained),
        per_image=_vision_flops(config, rows) + _connector_flops(config, rows),
        # Scores and their product with the values, over the half that the causal mask leaves.
        per_squared_length=_attention_flops(width, trains=True) / 2 * language.num_layers,
    )


def _vision_flops(config: RunConfig, rows: Iterable[WeightMapping]) -> float:
    """The vision tower on one image; layers after the feature layer are not run."""
    vision, trains = config.vision, "vision" in config.stage.learning_rates
    layers = vision.num_feature_layers
    patches = vision.num_image_tokens
    tokens = patches + vision_family(vision.family).num_class_tokens
    tower = [row for row in rows if row.part == "vision"]
    in_layers = sum(r.num_parameters for r in tower if r.layer is not None and r.layer < layers)
    embedding = sum(r.num_parameters for r in tower if r.layer is None)
    return (
        tokens * _flops(in_layers, trains=trains, passes_gradient=trains)
        + patches * _flops(embedding, trains=trains, passes_gradient=False)
        + tokens**2 * layers * _attention_flops(vision.hidden_size, trains=trains)
    )


def _connector_flops(config: RunConfig, rows: Iterable[WeightMapping]) -> float:
    """The connector on one image; the gradient of its input is needed by the tower alone."""
    trained = config.stage.learning_rates
    trains, below = "connector" in trained, "vision" in trained
    flops = 0.0
    for row in rows:
        if row.part == "connector":
            passes = below or (trains and not row.megatron.startswith(f"{CONNECTOR}linear_1."))
            flops += _flops(row.num_parameters, trains=trains, passes_gradient=passes)
    return flops * config.vision.num_image_tokens


def _is_factor(row: WeightMapping) -> bool:
    """Whether every token is multiplied with it: no bias or norm, nothing that is looked up.

    The output layer counts by labels, also where it is the embedding.
    """
    is_matrix = len(row.full_shape) > 1
    is_table = row.megatron in (EMBEDDING, OUTPUT_LAYER) or "position_embedding" in row.megatron
    return is_matrix and not is_table


def _weights(rows: Iterable[WeightMapping], part: str) -> int:
    return sum(row.num_parameters for row in rows if row.part == part)


def _flops(weights: int, *, trains: bool, passes_gradient: bool = True) -> float:
    """Per token: the product, the gradient of its input, and that of the weights."""
    return float(_PER_WEIGHT * weights * (1 + passes_gradient + trains))


def _attention_flops(width: int, *, trains: bool) -> float:
    """Per pair of tokens and layer: two products, and two more for the gradients of each."""
    return float(2 * _PER_WEIGHT * width * (3 if trains else 1))
