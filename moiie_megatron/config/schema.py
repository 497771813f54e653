"""A run as one typed, validated value.

Every section is a frozen pydantic model.  Conditions that involve several sections are in
``config/validate.py``.  Nothing here imports torch, so that a configuration can be checked on any
machine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from moiie_megatron.config.evaluation_schema import (
    EvaluationConfig,
    EvaluationSet,
    ValidationConfig,
)
from moiie_megatron.config.model_schema import (
    ConnectorConfig,
    LanguageConfig,
    LanguageFamilyName,
    LongRope,
    MoEConfig,
    RopeScaling,
    VisionConfig,
    VisionFamilyName,
)
from moiie_megatron.config.section import (
    MIN_FLOAT,
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Text,
)
from moiie_megatron.layout.experts import moe_layers
from moiie_megatron.layout.placement import Placement, place_experts
from moiie_megatron.layout.stages import layers_of_stages

__all__ = [
    "CheckpointConfig",
    "ConnectorConfig",
    "DataConfig",
    "EvaluationConfig",
    "EvaluationSet",
    "LanguageConfig",
    "LanguageFamilyName",
    "LogConfig",
    "LongRope",
    "MoEConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Part",
    "ProfileConfig",
    "RopeScaling",
    "RunConfig",
    "Section",
    "SourceConfig",
    "StageConfig",
    "TrainConfig",
    "ValidationConfig",
    "VisionConfig",
    "VisionFamilyName",
]

Part = Literal["vision", "connector", "language", "moe"]


class ParallelConfig(Section):
    """Degrees of parallelism; the remaining ranks are data-parallel."""

    tensor: PositiveInt = Field(1, description="tensor parallelism (TP)")
    sequence: bool | None = Field(None, description="sequence parallelism; null: if tensor > 1")
    pipeline: PositiveInt = Field(1, description="pipeline parallelism (PP)")
    virtual_pipeline: PositiveInt = Field(
        1,
        description="virtual stages (model chunks) of each pipeline rank (VPP); with more of them "
        "ranks are idle for less time, in Megatron's interleaved schedule",
    )
    pipeline_layers: list[PositiveInt] | None = Field(
        None,
        description="layers of every pipeline stage, virtual ones included, in the order of the "
        "model; null: equally many",
    )
    expert: PositiveInt = Field(1, description="expert parallelism (EP)")
    expert_tensor: PositiveInt = Field(1, description="tensor parallelism inside experts (ETP)")

    @property
    def stages(self) -> int:
        """Pipeline stages of the model, virtual ones included."""
        return self.pipeline * self.virtual_pipeline

    @property
    def sequence_parallel(self) -> bool:
        """Whether this run uses sequence parallelism."""
        return self.tensor > 1 if self.sequence is None else self.sequence


class StageConfig(Section):
    """A training stage: which parts train, and in which format samples are shown."""

    name: str = Field(description="name in logs and reports")
    moe: bool = Field(description="use the experts of the moe section; false: all FFNs are dense")
    learning_rates: dict[Part, PositiveFloat] = Field(
        description="peak learning rate of each part that trains; other parts are frozen, and "
        "null freezes a part that the preset trains"
    )
    template: str = Field(
        description="conversation format: plain, that of a model family, or tokenizer (the "
        "tokenizer's own chat template)"
    )
    image_mode: Literal["square", "pad"] = Field(
        description="resize an image to a square, or pad it to a square first"
    )

    @field_validator("learning_rates", mode="before")
    @classmethod
    def _null_freezes(cls, rates: Any) -> Any:
        """``learning_rates: {vision: null}`` removes a part from a preset's list."""
        if not isinstance(rates, dict):
            return rates
        parts = get_args(Part)
        return {key: rate for key, rate in rates.items() if rate is not None or key not in parts}


class SourceConfig(Section):
    """LLaVA records and the directory of their images; or, with ``loader: energon``, tar shards."""

    records: Text = Field(
        description="file of LLaVA records (.json or .jsonl); with loader energon a directory of "
        "tar shards, which hold the images too"
    )
    images: str | None = Field(
        None, description="directory that image paths are relative to; not used with shards"
    )
    weight: Annotated[float, Field(ge=MIN_FLOAT, le=1000.0)] = Field(
        1.0, description="how often an epoch sees each sample; 0.5 is every other epoch"
    )
    name: str | None = Field(None, description="name in messages; null: the name of the file")


class DataConfig(Section):
    """The sources of samples, and how samples become batches of tokens."""

    sources: list[SourceConfig] = Field(
        description="data sets of the mixture; a list, or the path of a YAML file with a list"
    )
    tokenizer: Text = Field(
        description="directory with tokenizer.json or a SentencePiece .model file, or that file; "
        "special and added tokens and the chat template are read from the files beside it"
    )
    sequence_length: PositiveInt = Field(
        description="longest sample, in tokens; longer ones are truncated"
    )
    image_token: str = Field("<image>", description="text of the image token in the vocabulary")
    markers_in_text: Literal["tokens", "text"] = Field(
        "tokens",
        description="special tokens that stand in the text of a conversation become their ids, as "
        "in transformers, or are kept as text, which spells them",
    )
    padding: Literal["longest", "sequence_length"] = Field(
        "longest",
        description="pad a micro-batch to its longest row, or to sequence_length",
    )
    packing: bool = Field(
        False,
        description="put several samples in a row of up to train.micro_batch_size * "
        "data.sequence_length tokens; a micro-batch is one row, and a step has the same samples "
        "as without packing, dealt to the data-parallel ranks anew",
    )
    loader: Literal["plain", "energon"] = Field(
        "plain",
        description="plain reads records and image files; energon reads tar shards "
        "(tools/prepare_data.py webdataset) from disk or object storage, and resumes with the "
        "same number of ranks and workers only",
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] = Field(
        2, description="worker processes of each rank; 0 loads in the training process"
    )
    allow_outside_images: bool = Field(
        False,
        description="read images outside the image directory too: through symbolic links out of "
        "it, and under absolute paths",
    )
    max_skipped_fraction: Fraction = Field(
        0.01, description="stop if more than this fraction of the samples is unusable"
    )
    validation: ValidationConfig = Field(
        ValidationConfig(), description="held-out samples, whose loss is logged"
    )


class OptimizerConfig(Section):
    """AdamW with a cosine schedule; the learning rates are in the stage section."""

    beta1: FractionBelowOne = Field(0.9, description="decay of the first moment")
    beta2: FractionBelowOne = Field(0.999, description="decay of the second moment")
    epsilon: PositiveFloat = Field(1e-8, description="epsilon of Adam")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    clip_grad: NonNegativeFloat = Field(1.0, description="largest gradient norm; 0: no clipping")
    warmup_ratio: Fraction = Field(0.03, description="fraction of the steps with linear warm-up")
    min_lr_ratio: Fraction = Field(0.0, description="final learning rate / peak learning rate")
    distributed: bool = Field(
        True, description="shard optimizer states over data-parallel ranks (ZeRO-1)"
    )
    megatron: dict[str, Any] = Field(
        {},
        description="further fields of Megatron-Core's OptimizerConfig, see "
        "[megatron-section.md](megatron-section.md#optimizermegatron)",
    )


class TrainConfig(Section):
    """Length, batch size and precision of the training."""

    global_batch_size: PositiveInt = Field(description="samples of an optimizer step")
    micro_batch_size: PositiveInt = Field(
        1,
        description="samples of a forward pass on one rank; with data.packing the length of a "
        "row in units of data.sequence_length",
    )
    steps: PositiveInt | None = Field(None, description="optimizer steps; give this or epochs")
    epochs: Annotated[float, Field(ge=MIN_FLOAT, le=1e6)] | None = Field(
        None, description="passes over the data"
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="dtype of weights and activations; the optimizer keeps fp32 copies"
    )
    seed: Seed = Field(1234, description="seed of initial weights and sample order")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: cuda if there is a GPU; else cpu, if torch is built without CUDA",
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        "auto",
        description="modules of the language model: Transformer Engine's or Megatron-Core's local "
        "ones; auto: Transformer Engine's on GPUs where it is installed",
    )
    gc_interval: PositiveInt | None = Field(
        None,
        description="collect Python's garbage every so many steps, on all ranks at once; null: "
        "each rank when Python decides",
    )
    exit_after_minutes: PositiveFloat | None = Field(
        None, description="save and exit after the step in which the program has run this long"
    )
    timeout_minutes: Annotated[int, Field(gt=0, le=525_600)] = Field(
        10,
        description="longest wait of a collective for the other ranks, also while they write or "
        "read a checkpoint; then the run fails",
    )
    max_skipped_steps: PositiveInt = Field(
        3, description="stop after this many consecutive steps with a loss or gradient not finite"
    )
    spike_factor: PositiveFloat = Field(
        3.0, description="report a loss above this multiple of the recent median"
    )
    deterministic: bool = Field(
        False,
        description="use deterministic kernels only, which are slower; stop at an operation "
        "that has none.  Runs are equal bit by bit on the same machines with the same parallel "
        "layout and NCCL version",
    )


class CheckpointConfig(Section):
    """The initial weights, and how checkpoints are saved."""

    init_from: Text | None = Field(
        None, description="checkpoint of an earlier stage with the initial weights"
    )
    new_connector: bool = Field(
        False, description="initialize the connector randomly instead of from init_from"
    )
    interval: PositiveInt = Field(500, description="steps between checkpoints")
    keep: PositiveInt = Field(
        2, description="number of checkpoints to keep; older ones are deleted"
    )
    asynchronous: bool = Field(
        False, description="write in the background, from a copy in host memory"
    )


class ProfileConfig(Section):
    """Traces of torch's profiler, ``OUTPUT/profile/*.json`` for chrome://tracing or Perfetto."""

    steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = Field(
        None, description="first and last step to trace, counted from 1; null: no trace"
    )
    ranks: list[NonNegativeInt] = Field([0], description="ranks to trace")


class LogConfig(Section):
    """Intervals and targets of the logs."""

    interval: PositiveInt = Field(
        1, description="steps between lines of standard output, metrics.jsonl and TensorBoard"
    )
    routing_interval: PositiveInt = Field(
        10,
        description="steps between records of routing.jsonl; every checkpoint writes one too",
    )
    peak_tflops: PositiveFloat | None = Field(
        None,
        description="dense bf16 TFLOP/s of a GPU, of which MFU is the fraction; null: by the "
        "name of the GPU",
    )
    wandb_project: Text | None = Field(
        None, description="project of Weights & Biases to report to (extra: wandb); null: none"
    )


class RunConfig(Section):
    """One training run."""

    output: Text = Field(
        description="output directory for checkpoints, logs and the resolved configuration"
    )
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
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
    log: LogConfig = LogConfig()
    megatron: dict[str, Any] = Field(
        {},
        description="further fields of Megatron-Core's TransformerConfig, see "
        "[megatron-section.md](megatron-section.md#megatron)",
    )
    ddp: dict[str, Any] = Field(
        {},
        description="further fields of Megatron-Core's DistributedDataParallelConfig, see "
        "[megatron-section.md](megatron-section.md#ddp)",
    )

    @property
    def has_experts(self) -> bool:
        """Whether the stage has experts; ``check_config`` then requires a layer for them."""
        return self.stage.moe and self.moe.variant != "dense"

    @property
    def moe_layers(self) -> list[int]:
        """Indices (from 0) of the layers with experts in this run; empty in a dense stage."""
        if not self.has_experts:
            return []
        return moe_layers(self.moe.layers, self.language.num_layers)

    @property
    def pipeline_layers(self) -> list[int] | None:
        """Layers of every pipeline stage, virtual ones included, in the order of the model.

        None if they cannot be divided as the run wants, which ``check_config`` refuses.
        """
        parallel = self.parallel
        return layers_of_stages(self.language.num_layers, parallel.stages, parallel.pipeline_layers)

    @property
    def micro_batches_multiple_of(self) -> int:
        """What the number of micro-batches of a rank in a step is a multiple of.

        Megatron's interleaved schedule runs groups of as many micro-batches as there are pipeline
        ranks (``microbatch_group_size_per_vp_stage``).
        """
        return self.parallel.pipeline if self.parallel.virtual_pipeline > 1 else 1

    @property
    def micro_batch_shape(self) -> tuple[int, int]:
        """Rows of a micro-batch, and the maximum length of a row in tokens."""
        samples, length = self.train.micro_batch_size, self.data.sequence_length
        return (1, samples * length) if self.data.packing else (samples, length)

    @property
    def placement(self) -> Placement:
        """The mapping of the experts to this run's expert-parallel ranks."""
        moe = self.moe
        loads = None if moe.expert_loads is None else tuple(moe.expert_loads)
        return place_experts(
            moe.placement, moe.layout, self.parallel.expert, moe.image_fraction, loads
        )

    @property
    def active_parallel(self) -> ParallelConfig:
        """The degrees that this run uses: 1 for those of experts in a dense stage."""
        if self.moe_layers:
            return self.parallel
        return self.parallel.model_copy(update={"expert": 1, "expert_tensor": 1})
