"""Which part of every tensor each rank of a parallel layout holds.

The rules are those of Megatron's ``sharded_state_dict``: a gated ``linear_fc1`` is two tensors,
gate and up, experts are one tensor each, and what is not cut is the same on all ranks of a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.families.weight_map import EMBEDDING, LANGUAGE, VOCABULARY, WeightMapping
from moiie_megatron.layout.stages import layers_of_ranks
from moiie_megatron.layout.vocabulary import padded_vocab_size


@dataclass(frozen=True)
class TensorShards:
    """A box of a tensor, and who reads it.

    Args:
        offsets: Where it begins.
        shape: Its size.
        stage: The pipeline rank.
        owner: ``("all",)`` the whole stage, ``("tensor", rank)`` one tensor-parallel rank,
            ``("expert", rank, tensor rank)`` one expert-parallel rank.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stage: int
    owner: tuple[str | int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def shard_plan(config: RunConfig, row: WeightMapping, shape: tuple[int, ...]) -> list[TensorShards]:
    """The boxes that a tensor falls into in the layout of ``config.parallel``.

    Args:
        config: Must have passed ``check_config``.
        row: Of the weight; of experts any one's.
        shape: The whole tensor's; experts are its first axis.
    """
    parallel, stage = config.parallel, _stage(config, row)
    if row.expert is None:
        return [
            TensorShards(offsets, sizes, stage, ("all",) if rank is None else ("tensor", rank))
            for rank, offsets, sizes in _parts(row, shape, parallel.tensor)
            if all(sizes)
        ]
    order = config.placement.physical_to_logical
    local = len(order) // parallel.expert
    return [
        TensorShards((expert, *offsets), (1, *sizes), stage, ("expert", slot // local, rank or 0))
        for slot, expert in enumerate(order)
        for rank, offsets, sizes in _parts(row, shape[1:], parallel.expert_tensor)
    ]


def unsplit(shape: tuple[int, ...]) -> list[TensorShards]:
    """The plan of a tensor that is no weight: the first stage has all of it."""
    return [TensorShards((0,) * len(shape), shape, 0, ("all",))]


def _parts(
    row: WeightMapping, shape: tuple[int, ...], ranks: int
) -> list[tuple[int | None, tuple[int, ...], tuple[int, ...]]]:
    """Tensor rank (None: all), offsets and sizes, rank by rank."""
    axis, blocks = row.shard_axis, row.shard_blocks
    if axis is None:
        return [(None, (0,) * len(shape), shape)]
    whole = shape[axis]
    # The last ranks of a padded vocabulary have fewer rows, or none.
    size = (padded_vocab_size(whole, ranks) if row.megatron in VOCABULARY else whole) // (
        blocks * ranks
    )
    before, behind = (0,) * axis, (0,) * (len(shape) - axis - 1)
    parts: list[tuple[int | None, tuple[int, ...], tuple[int, ...]]] = []
    for rank in range(ranks):
        for block in range(blocks):
            begin = (block * ranks + rank) * size
            sizes = (*shape[:axis], max(0, min(size, whole - begin)), *shape[axis + 1 :])
            parts.append((rank, (*before, begin, *behind), sizes))
    return parts


def _stage(config: RunConfig, row: WeightMapping) -> int:
    """The first pipeline rank that holds a tensor (tied embeddings are on the last one, too)."""
    stages = config.parallel.pipeline
    if not row.megatron.startswith(LANGUAGE) or row.megatron == EMBEDDING:
        return 0
    if row.layer is None:
        return stages - 1
    assert config.pipeline_layers is not None  # see config/validate_parallel.py
    ranks = layers_of_ranks(config.pipeline_layers, stages)
    return next(r for r, held in enumerate(ranks) if any(row.layer in layers for layers in held))
