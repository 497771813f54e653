"""The sections of a configuration that describe the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from moiie_megatron.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from moiie_megatron.config.section import (
    MAX_FLOAT,
    MAX_INT,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
)
from moiie_megatron.layout.experts import ExpertLayout


def _one_of(names: Mapping[str, Any]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(value)  # config/messages.py makes the sentence, from "enum"
        return value

    return AfterValidator(check)


LanguageFamilyName = Annotated[
    str, _one_of(LANGUAGE_FAMILIES), Field(json_schema_extra={"enum": [*LANGUAGE_FAMILIES]})
]
VisionFamilyName = Annotated[
    str, _one_of(VISION_FAMILIES), Field(json_schema_extra={"enum": [*VISION_FAMILIES]})
]
# Lists of layers and of experts are made, and experts placed by a search over them.
LayerCount = Annotated[int, Field(gt=0, le=10_000)]
ExpertCount = Annotated[int, Field(ge=0, le=256)]


class RopeScaling(Section):
    """Llama 3.1 frequency scaling (transformers' ``rope_type: llama3``)."""

    factor: PositiveFloat = Field(description="divisor of the low frequencies")
    low_freq_factor: PositiveFloat = Field(
        1.0,
        description="wavelengths above original_max_position_embeddings / low_freq_factor are "
        "scaled",
    )
    high_freq_factor: PositiveFloat = Field(
        4.0,
        description="wavelengths below original_max_position_embeddings / high_freq_factor are not",
    )
    original_max_position_embeddings: PositiveInt = Field(
        8192, description="positions that the model was pretrained with"
    )


class LongRope(Section):
    """LongRoPE (arXiv 2402.13753; transformers' ``rope_type: longrope``), as in Phi-3 with 128k.

    Every frequency is divided by a number of its own: from ``short_factor`` in sequences of up to
    ``original_max_position_embeddings`` positions, from ``long_factor`` in longer ones.
    """

    short_factor: list[PositiveFloat] = Field(
        description="divisors in short sequences, one per pair of channels of a head"
    )
    long_factor: list[PositiveFloat] = Field(
        description="divisors in long sequences, one per pair of channels of a head"
    )
    factor: Annotated[float, Field(ge=1.0, le=MAX_FLOAT)] = Field(
        description="max_position_embeddings / original_max_position_embeddings"
    )
    original_max_position_embeddings: Annotated[int, Field(gt=1, le=MAX_INT)] = Field(
        4096, description="length of the longest short sequence, in positions"
    )

    @property
    def attention_factor(self) -> float:
        """The factor of queries and keys, in sequences of every length."""
        return math.sqrt(
            1 + math.log(self.factor) / math.log(self.original_max_position_embeddings)
        )


class LanguageConfig(Section):
    """The decoder of the language model.

    ``family`` selects the names of the weights and the form of ``config.json``; the other keys
    describe the model completely.
    """

    family: LanguageFamilyName = Field(description="model family")
    num_layers: LayerCount = Field(description="transformer layers")
    hidden_size: PositiveInt = Field(description="channels of a hidden state")
    ffn_hidden_size: PositiveInt = Field(
        description="channels inside the FFN, and inside each expert"
    )
    num_attention_heads: PositiveInt = Field(description="query heads")
    num_query_groups: PositiveInt = Field(
        description="key and value heads (grouped-query attention)"
    )
    head_dim: PositiveInt | None = Field(
        None, description="channels of a head; null: hidden_size / num_attention_heads"
    )
    qkv_bias: bool = Field(False, description="query, key and value projections have biases")
    qk_norm: bool = Field(False, description="RMSNorm on every query and key head, before RoPE")
    vocab_size: PositiveInt = Field(description="rows of the embedding")
    max_position_embeddings: PositiveInt = Field(description="longest sequence, in tokens")
    rotary_base: PositiveFloat = Field(10000.0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(None, description="Llama 3.1 frequency scaling")
    longrope: LongRope | None = Field(None, description="LongRoPE frequency scaling")
    norm_epsilon: PositiveFloat = Field(1e-5, description="epsilon of RMSNorm")
    tied_embeddings: bool = Field(False, description="the output layer uses the embedding's weight")
    sliding_window: PositiveInt | None = Field(
        None, description="tokens that a token attends to, itself included; null: all before it"
    )
    pretrained: Text | None = Field(
        None, description="Hugging Face directory with the initial weights; null: random weights"
    )

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class VisionConfig(Section):
    """The vision encoder, a ViT."""

    family: VisionFamilyName = Field(description="model family")
    hidden_size: PositiveInt = Field(description="channels of a hidden state")
    ffn_hidden_size: PositiveInt = Field(description="channels inside the FFN")
    num_layers: LayerCount = Field(description="transformer layers")
    num_attention_heads: PositiveInt = Field(description="attention heads")
    image_size: PositiveInt = Field(description="height and width of an input image, in pixels")
    patch_size: PositiveInt = Field(description="height and width of a patch, in pixels")
    activation: Literal["gelu_pytorch_tanh", "quick_gelu", "gelu"] = Field(
        description="activation of the FFN, as transformers names it"
    )
    norm_epsilon: PositiveFloat = Field(1e-6, description="epsilon of LayerNorm")
    feature_layer: Annotated[int, Field(ge=-MAX_INT, le=-1)] = Field(
        -2,
        description="layer whose output is the image features, counted from the end: -1 is the "
        "last",
    )
    recompute: bool = Field(
        False, description="recompute activations in the backward pass, to save memory"
    )
    pretrained: Text | None = Field(
        None, description="Hugging Face directory with the initial weights; null: random weights"
    )

    @property
    def num_image_tokens(self) -> int:
        """Image tokens per image: one per patch, without a class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_feature_layers(self) -> int:
        """Layers that the image features depend on; later layers are never run."""
        return self.num_layers + 1 + self.feature_layer


class ConnectorConfig(Section):
    """The two-layer MLP between vision encoder and language model (Linear, GELU, Linear)."""

    hidden_size: PositiveInt | None = Field(
        None, description="channels between the two layers; null: language.hidden_size"
    )


class MoEConfig(Section):
    """The experts, their placement, and how tokens are routed to them (paper, section 3)."""

    variant: Literal["dense", "vanilla", "modality", "moiie"] = Field(
        "moiie",
        description="dense: no experts; vanilla: shared experts only; modality: vision and text "
        "experts; moiie: vision, shared and text experts",
    )
    num_vision_experts: ExpertCount | None = Field(
        None, description="experts for image tokens only; null: the paper's four-expert model"
    )
    num_shared_experts: ExpertCount | None = Field(
        None, description="experts for all tokens; null: the paper's four-expert model"
    )
    num_text_experts: ExpertCount | None = Field(
        None, description="experts for text tokens only; null: the paper's four-expert model"
    )
    layers: Literal["interleaved", "all"] | list[int] = Field(
        "interleaved",
        description="layers that hold experts: interleaved (1, 3, 5, ...), all, or indices from 0",
    )
    top_k: PositiveInt = Field(2, description="experts that process each token, 2 or more")
    vision_aux_loss_coeff: NonNegativeFloat = Field(
        0.001, description="coefficient of the load-balancing loss of the vision router"
    )
    text_aux_loss_coeff: NonNegativeFloat = Field(
        0.001, description="coefficient of the load-balancing loss of the text or joint router"
    )
    aux_loss: Literal["per_layer", "pooled"] = Field(
        "per_layer",
        description="load-balancing loss of each layer, or pooled over the tokens of all layers "
        "as in the reference implementation",
    )
    z_loss_coeff: NonNegativeFloat = Field(
        0.0, description="coefficient of the z-loss of every router"
    )
    router_init_std: NonNegativeFloat = Field(
        0.02, description="standard deviation of new router weights"
    )
    router_dtype: Literal["fp32", "model"] = Field(
        "fp32", description="dtype of the router's matrix multiplication"
    )
    dispatcher: Literal["moiie", "alltoall", "allgather", "flex"] = Field(
        "moiie",
        description="token dispatcher: this project's all-to-all, or one of Megatron-Core's",
    )
    placement: Literal["balanced", "contiguous"] = Field(
        "balanced",
        description="mapping of experts to expert-parallel ranks: with even loads, or in "
        "the order of their ids",
    )
    image_fraction: Fraction = Field(
        0.7,
        description="expected fraction of image tokens; used by placement if the experts of each "
        "group cannot be spread evenly",
    )
    expert_loads: list[NonNegativeFloat] | None = Field(
        None,
        description="measured number of tokens of each expert, by id; used by placement instead "
        "of image_fraction",
    )
    last_image_token_as_text: bool = Field(
        False,
        description="route the last image token of every image as text, as the reference "
        "implementation does",
    )

    @property
    def layout(self) -> ExpertLayout:
        """The expert groups that these numbers mean.

        Raises:
            UserError: The counts do not fit the variant.
        """
        return ExpertLayout.from_variant(
            self.variant,
            vision=self.num_vision_experts,
            shared=self.num_shared_experts,
            text=self.num_text_experts,
            top_k=self.top_k,
        )
