"""What a run is: one typed, validated value.

Every section is a frozen pydantic model that refuses unknown keys.  A section says what it
means alone; conditions that join several sections are in ``config/validate.py``.  Nothing here
imports torch, so a configuration can be checked on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from moiie_megatron.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from moiie_megatron.layout.experts import ExpertLayout, moe_layers
from moiie_megatron.layout.placement import Placement, balanced, contiguous

Part = Literal["vision", "connector", "language", "moe"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the configuration: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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


class RopeScaling(Section):
    """Llama-3.1 frequency scaling (transformers' ``rope_type: llama3``)."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192


class LongRope(Section):
    """LongRoPE (arXiv 2402.13753; transformers' ``rope_type: longrope``), as in Phi-3 with 128k.

    Every frequency has a divisor of its own: ``short_factor`` in sequences of up to
    ``original_max_position_embeddings`` positions, ``long_factor`` in longer ones.
    """

    short_factor: list[PositiveFloat]
    long_factor: list[PositiveFloat]
    factor: Annotated[float, Field(ge=1.0)] = Field(
        description="max_position_embeddings / original_max_position_embeddings"
    )
    original_max_position_embeddings: Annotated[int, Field(gt=1)] = 4096

    @property
    def attention_factor(self) -> float:
        """What queries and keys are multiplied by, in sequences of every length."""
        return math.sqrt(
            1 + math.log(self.factor) / math.log(self.original_max_position_embeddings)
        )


class LanguageConfig(Section):
    """The decoder that is the backbone of the language side.

    ``family`` says what the weights are called and how ``config.json`` describes the model; the
    other keys say all that the model itself needs to know.
    """

    family: LanguageFamilyName
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    head_dim: PositiveInt | None = Field(
        None, description="channels of a head; default: hidden_size / num_attention_heads"
    )
    qkv_bias: bool = Field(False, description="query, key and value projections have biases")
    qk_norm: bool = Field(False, description="RMSNorm on every query and key head, before RoPE")
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rotary_base: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    longrope: LongRope | None = None
    norm_epsilon: PositiveFloat = 1e-5
    tied_embeddings: bool = False
    sliding_window: PositiveInt | None = None
    pretrained: str | None = Field(None, description="Hugging Face directory with the weights")

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class VisionConfig(Section):
    """The vision encoder; its features are the hidden states after layer ``feature_layer``."""

    family: VisionFamilyName
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_layers: PositiveInt
    num_attention_heads: PositiveInt
    image_size: PositiveInt
    patch_size: PositiveInt
    activation: Literal["gelu_pytorch_tanh", "quick_gelu", "gelu"]
    norm_epsilon: PositiveFloat = 1e-6
    feature_layer: Annotated[int, Field(le=-1)] = -2
    recompute: bool = Field(False, description="keep the layers' inputs alone for backward")
    pretrained: str | None = Field(None, description="Hugging Face directory with the weights")

    @property
    def num_image_tokens(self) -> int:
        """Image tokens per image: one per patch, without a class token."""
        return (self.image_size // self.patch_size) ** 2


class ConnectorConfig(Section):
    """The two-layer MLP between vision encoder and language model (Linear, GELU, Linear)."""

    hidden_size: PositiveInt | None = Field(None, description="default: the language hidden size")


class MoEConfig(Section):
    """Which experts exist, where they sit, and how tokens reach them (paper, section 3)."""

    variant: Literal["dense", "vanilla", "modality", "moiie"] = "moiie"
    num_vision_experts: Annotated[int, Field(ge=0)] | None = None
    num_shared_experts: Annotated[int, Field(ge=0)] | None = None
    num_text_experts: Annotated[int, Field(ge=0)] | None = None
    layers: Literal["interleaved", "all"] | list[int] = "interleaved"
    top_k: PositiveInt = 2
    vision_aux_loss_coeff: NonNegativeFloat = 0.001
    text_aux_loss_coeff: NonNegativeFloat = 0.001
    aux_loss: Literal["per_layer", "pooled"] = Field(
        "per_layer", description="pooled: over the tokens of all layers, as the reference does"
    )
    z_loss_coeff: NonNegativeFloat = 0.0
    router_init_std: NonNegativeFloat = 0.02
    router_dtype: Literal["fp32", "model"] = "fp32"
    dispatcher: Literal["moiie", "alltoall", "allgather", "flex"] = "moiie"
    placement: Literal["balanced", "contiguous"] = "balanced"
    image_fraction: Fraction = Field(
        0.7, description="expected share of image tokens, where no placement suits every share"
    )
    expert_loads: list[NonNegativeFloat] | None = Field(
        None, description="measured tokens by logical expert, to place by instead of image_fraction"
    )
    last_image_token_as_text: bool = Field(
        False, description="the last image token of every run counts as text, as in the reference"
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


class ParallelConfig(Section):
    """Degrees of parallelism; what is left of the world size is data parallelism."""

    tensor: PositiveInt = 1
    sequence: bool | None = Field(None, description="sequence parallelism; default: tensor > 1")
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    expert_tensor: PositiveInt = 1

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence


class StageConfig(Section):
    """A training stage: what trains and how fast; parts without a learning rate are frozen."""

    name: str
    moe: bool = Field(description="False: the FFN stays dense whatever the moe section says")
    learning_rates: dict[Part, PositiveFloat]
    template: str = Field(
        description="tokenizer (its own chat template), plain (image and caption alone), or a "
        "format that a family brings along"
    )
    image_mode: Literal["square", "pad"]

    @field_validator("learning_rates", mode="before")
    @classmethod
    def _null_freezes(cls, rates: Any) -> Any:
        """``learning_rates: {vision: null}`` takes a part out of a preset's list."""
        if not isinstance(rates, dict):
            return rates
        return {part: rate for part, rate in rates.items() if rate is not None}


class SourceConfig(Section):
    """LLaVA records (.json or .jsonl) and the folder that their image paths are relative to; or,
    with ``loader: energon``, a folder of tar shards that hold both."""

    records: str
    images: str | None = Field(None, description="not needed for shards, which hold the images")
    weight: PositiveFloat = Field(
        1.0, description="how often an epoch sees each sample; 0.5 is every other epoch"
    )
    name: str | None = Field(None, description="for messages; default: the name of the file")


class DataConfig(Section):
    """Where samples come from and how they become tokens."""

    sources: list[SourceConfig] = Field(
        description="a list, or the path of a YAML file that holds one"
    )
    tokenizer: str = Field(description="folder with tokenizer.json, or a SentencePiece .model")
    sequence_length: PositiveInt
    image_token: str = "<image>"
    padding: Literal["longest", "sequence_length"] = Field(
        "longest", description="to the longest sample (packed: the samples) of a micro-batch"
    )
    packing: bool = Field(
        False,
        description="samples share rows of train.micro_batch_size * data.sequence_length tokens; "
        "a micro-batch is one row, and a step has the samples that it has without packing",
    )
    loader: Literal["plain", "energon"] = Field(
        "plain",
        description="energon reads tar shards (tools/prepare_data.py webdataset) from disk or "
        "object storage; resumes on the same number of ranks and workers only",
    )
    num_workers: Annotated[int, Field(ge=0)] = 2
    max_skipped_fraction: Fraction = 0.01


class OptimizerConfig(Section):
    """AdamW with a cosine schedule; learning rates belong to the stage."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = 1.0
    warmup_ratio: Fraction = 0.03
    min_lr_ratio: Fraction = 0.0
    distributed: bool = Field(True, description="Megatron's distributed optimizer (ZeRO-1)")


class TrainConfig(Section):
    """How much to train, in which portions and precision."""

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = Field(
        1, description="samples; with data.packing the length of a row in data.sequence_length"
    )
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: Annotated[int, Field(ge=0)] = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    exit_after_minutes: PositiveFloat | None = Field(
        None, description="save and end after the step in which the program has run this long"
    )
    max_skipped_steps: PositiveInt = Field(
        3, description="stop after so many steps in a row whose loss or gradient is not finite"
    )
    spike_factor: PositiveFloat = Field(
        3.0, description="report a loss above this multiple of the recent median"
    )
    deterministic: bool = Field(
        False,
        description="only kernels that give the same bits every time, at some speed; an operation "
        "without one stops the run.  Promised for one layout and the same machines: other sums "
        "in collectives (another layout, NCCL version or topology) round differently",
    )


class CheckpointConfig(Section):
    """What the weights start from and how often the run is saved."""

    init_from: str | None = Field(None, description="checkpoint of an earlier stage")
    new_connector: bool = Field(False, description="leave init_from's connector out: start afresh")
    interval: PositiveInt = 500
    keep: PositiveInt = 2
    asynchronous: bool = Field(
        False, description="write in the background while training goes on (a copy in memory)"
    )


class ProfileConfig(Section):
    """Traces of torch's profiler, ``OUTPUT/profile/*.json`` for chrome://tracing or Perfetto."""

    steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = Field(
        None, description="first and last step to trace, counted from 1"
    )
    ranks: list[Annotated[int, Field(ge=0)]] = Field([0], description="ranks that are traced")


class LogConfig(Section):
    """How often a run says what."""

    interval: PositiveInt = Field(
        1, description="steps between lines of standard output, metrics.jsonl and TensorBoard"
    )
    routing_interval: PositiveInt = Field(
        10, description="steps between records of routing.jsonl; every checkpoint writes one too"
    )
    wandb_project: str | None = Field(
        None, description="also report to this project of Weights & Biases (extra: wandb)"
    )


class RunConfig(Section):
    """One training run."""

    output: str = Field(description="folder for checkpoints, metrics and the resolved config")
    language: LanguageConfig
    vision: VisionConfig
    connector: ConnectorConfig = ConnectorConfig()
    moe: MoEConfig = MoEConfig()
    parallel: ParallelConfig = ParallelConfig()
    stage: StageConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    log: LogConfig = LogConfig()
    megatron: dict[str, Any] = Field({}, description="further TransformerConfig fields")

    @property
    def moe_layers(self) -> list[int]:
        """Layers (from 0) that hold experts in this run; empty while the stage is dense."""
        if not self.stage.moe or self.moe.variant == "dense":
            return []
        return moe_layers(self.moe.layers, self.language.num_layers)

    @property
    def micro_batch_shape(self) -> tuple[int, int]:
        """Rows of a micro-batch, and the most tokens of one."""
        samples, length = self.train.micro_batch_size, self.data.sequence_length
        return (1, samples * length) if self.data.packing else (samples, length)

    @property
    def placement(self) -> Placement:
        """The physical order of the experts over this run's expert-parallel ranks."""
        moe = self.moe
        loads = None if moe.expert_loads is None else tuple(moe.expert_loads)
        return _placement(
            moe.placement, moe.layout, self.parallel.expert, moe.image_fraction, loads
        )

    @property
    def active_parallel(self) -> ParallelConfig:
        """The degrees this run uses: a dense stage has no experts to spread over ranks."""
        if self.moe_layers:
            return self.parallel
        return self.parallel.model_copy(update={"expert": 1, "expert_tensor": 1})


# Not a cached property: pydantic's model_copy(update=...) would keep the old value.
@lru_cache(maxsize=64)
def _placement(
    kind: str,
    layout: ExpertLayout,
    ep_size: int,
    image_fraction: float,
    loads: tuple[float, ...] | None,
) -> Placement:
    """The placement of these settings; ``balanced`` searches, so it is computed once for each."""
    if kind == "contiguous":
        return contiguous(layout, ep_size, image_fraction)
    return balanced(layout, ep_size, image_fraction=image_fraction, loads=loads)
