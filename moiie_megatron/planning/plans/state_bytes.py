"""Bytes of weights, gradients and optimizer states of every pipeline rank: arithmetic, no torch.

Every tensor of the weight map is divided as the run divides it.  Left out are the few bytes of
padding at the ends of Megatron's gradient buffers, and buffers that are no parameters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from moiie_megatron.config.megatron_section.sections import ddp_fields, optimizer_fields
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.families.weight_map import (
    EMBEDDING,
    VOCABULARY,
    WeightMapping,
    model_rows,
)
from moiie_megatron.layout.stages import layers_of_ranks
from moiie_megatron.layout.vocabulary import padded_vocab_size

_BYTES: Final = {"fp32": 4, "bf16": 2, "fp16": 2}
_CHECKPOINT: Final = 12  # bytes of a parameter's optimizer state: fp32 weight and two moments


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds all the time, and what it writes.

    Attributes:
        parameters: Number of parameters on the rank.
        trained: How many of them train.
        weights: Bytes in the dtype of the run.
        gradients: Bytes of the buffers.
        optimizer: Bytes of this rank's part of the states, on the device.
        written: Bytes of a checkpoint that this rank writes; a save in the background keeps a copy
            of them in host memory.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    written: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that every layout divides in the same way.

    Attributes:
        place: Number of their decoder layer, or ``first`` or ``last`` pipeline rank.
        is_expert: Whether they are experts.
        is_split: Whether tensor parallelism splits them.
        is_vocabulary: Whether they have a row for every token.
        is_embedding: Whether they are the embedding.
        trains: Whether they have gradients.
    """

    place: int | Literal["first", "last"]
    is_expert: bool
    is_split: bool
    is_vocabulary: bool
    is_embedding: bool
    trains: bool


def tensor_groups(config: RunConfig) -> dict[TensorGroup, int]:
    """The parameters of a run's model, by group, whatever its layout."""
    groups: Counter[TensorGroup] = Counter()
    for row in model_rows(config):
        is_embedding = row.megatron == EMBEDDING
        place: int | Literal["first", "last"] = "last"  # final norm and output layer
        part = row.part
        if part in ("vision", "connector") or is_embedding:
            place = "first"
        elif row.layer is not None:
            place = row.layer
        group = TensorGroup(
            place=place,
            is_expert=part == "experts",
            is_split=row.shard_axis is not None,
            is_vocabulary=row.megatron in VOCABULARY,
            is_embedding=is_embedding,
            trains=_trains(config, row, part),
        )
        groups[group] += row.num_parameters
    return dict(groups)


def state_bytes(
    config: RunConfig, world: int, groups: Mapping[TensorGroup, int] | None = None
) -> list[StateBytes]:
    """The bytes of a rank of every pipeline rank; all ranks of one hold as much.

    Args:
        config: The run.
        world: Number of ranks.
        groups: ``tensor_groups``, where many layouts of one model are asked for.
    """
    parallel = config.active_parallel
    assert config.pipeline_layers is not None  # see config/validate_parallel.py
    ranks = layers_of_ranks(config.pipeline_layers, parallel.pipeline)
    held: list[list[_Held]] = [[] for _ in ranks]
    by_group = tensor_groups(config) if groups is None else groups
    for holders, part in _held(config, by_group, ranks):
        for rank in holders:
            held[rank].append(part)
    return [_bytes_of(config, world, parts) for parts in held]


def optimizer_bytes(config: RunConfig) -> float:
    """Bytes on the device for each parameter that the optimizer updates."""
    fields = optimizer_fields(config)
    # In fp32 the weights are their own copy.
    main = 0 if config.train.precision == "fp32" else 4
    if fields.get("use_precision_aware_optimizer"):
        main = _BYTES[fields.get("main_params_dtype", "fp32")]
    moments = sum(
        _BYTES[fields.get(name, "fp32")] for name in ("exp_avg_dtype", "exp_avg_sq_dtype")
    )
    if fields.get("optimizer_cpu_offload"):
        return (main + moments) * (1.0 - float(fields.get("optimizer_offload_fraction", 1.0)))
    return float(main + moments)


def gradient_bytes(config: RunConfig) -> int:
    """Bytes for each parameter that trains."""
    in_fp32 = ddp_fields(config).get("grad_reduce_in_fp32", True)
    return 4 if in_fp32 or config.train.precision == "fp32" else 2


@dataclass(frozen=True)
class _Held:
    """A rank's part of a group of tensors.

    Attributes:
        elements: Number of elements.
        trains: Whether it has gradients.
        is_expert: Whether it belongs to the expert-parallel groups.
        copies: Ranks of a data-parallel replica that hold the same part.
    """

    elements: int
    trains: bool
    is_expert: bool
    copies: int


def _held(
    config: RunConfig,
    groups: Mapping[TensorGroup, int],
    ranks: Sequence[Sequence[range]],
) -> Iterator[tuple[tuple[int, ...], _Held]]:
    """A rank's part of every group, and the pipeline ranks that hold it."""
    parallel, language = config.active_parallel, config.language
    holders: dict[object, tuple[int, ...]] = {
        layer: (rank,) for rank, chunks in enumerate(ranks) for chunk in chunks for layer in chunk
    }
    last = len(ranks) - 1
    holders |= {"first": (0,), "last": (last,)}
    for group, parameters in groups.items():
        elements = parameters
        if group.is_expert:  # all experts are alike
            elements //= parallel.expert
        if group.is_vocabulary:
            vocabulary = language.vocab_size
            elements = elements // vocabulary * padded_vocab_size(vocabulary, parallel.tensor)
        ways = parallel.expert_tensor if group.is_expert else parallel.tensor
        where = holders[group.place]
        if group.is_embedding and language.tied_embeddings and last:
            where = (0, last)  # a copy for the logits
        yield (
            where,
            _Held(
                elements=elements // ways if group.is_split else elements,
                trains=group.trains,
                is_expert=group.is_expert,
                copies=1 if group.is_split else ways,
            ),
        )


def _trains(config: RunConfig, row: WeightMapping, part: str) -> bool:
    if part == "vision":
        is_unused = row.layer is not None and row.layer >= config.vision.num_feature_layers
        if is_unused or ".post_layernorm." in row.megatron:
            return False
    name = "moe" if part in ("experts", "routers") else part
    return name in config.stage.learning_rates


def _bytes_of(config: RunConfig, world: int, held: list[_Held]) -> StateBytes:
    parallel = config.active_parallel
    replicas = {
        False: world // (parallel.tensor * parallel.pipeline),
        True: world // (parallel.expert_tensor * parallel.expert * parallel.pipeline),
    }
    width = _BYTES[config.train.precision]
    trained = sum(part.elements for part in held if part.trains)
    updated = written = 0.0
    for part in held:
        replicated = replicas[part.is_expert]
        if part.trains:
            updated += part.elements / (replicated if config.optimizer.distributed else 1)
        kept = width + (_CHECKPOINT if part.trains else 0)
        written += part.elements * kept / (replicated * part.copies)
    parameters = sum(part.elements for part in held)
    return StateBytes(
        parameters=parameters,
        trained=trained,
        weights=parameters * width,
        gradients=trained * gradient_bytes(config),
        optimizer=math.ceil(updated * optimizer_bytes(config)),
        written=math.ceil(written),
    )
