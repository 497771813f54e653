"""Which part of every tensor each rank of a parallel layout holds.

The rules are those of Megatron's ``sharded_state_dict``: a gated ``linear_fc1`` is two tensors,
gate and up, experts are one tensor each, and what is not cut is the same on all ranks of a stage.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.families.weight_map import EXPERTS, LANGUAGE

_BY_ROWS = re.compile(r"(word_embeddings|output_layer|linear_qkv)\.weight$")
_GATED = re.compile(r"linear_fc1\.weight$")
_BY_COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TensorShards:
    """A box of a tensor, and who reads it.

    Args:
        offsets: Where it begins.
        shape: Its size.
        stage: The pipeline stage.
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


def shard_plan(config: RunConfig, name: str, shape: tuple[int, ...]) -> list[TensorShards]:
    """The boxes that a tensor falls into in the layout of ``config.parallel``.

    Args:
        config: Must have passed ``check_config``.
        name: A weight under its Megatron name.
        shape: The whole tensor's; experts are its first axis.
    """
    stage = _stage(config, name)
    if not name.startswith(LANGUAGE):
        return [TensorShards((0,) * len(shape), shape, stage, ("all",))]
    if EXPERTS in name:
        return _expert_cuts(config, name, shape, stage)
    return [
        TensorShards(offsets, sizes, stage, ("all",) if owner is None else ("tensor", owner))
        for owner, offsets, sizes in _parts(name, shape, config.parallel.tensor)
    ]


def _expert_cuts(
    config: RunConfig, name: str, shape: tuple[int, ...], stage: int
) -> list[TensorShards]:
    parallel, places = config.parallel, config.placement.physical_to_logical
    local = len(places) // parallel.expert
    return [
        TensorShards((expert, *offsets), (1, *sizes), stage, ("expert", place // local, owner or 0))
        for place, expert in enumerate(places)
        for owner, offsets, sizes in _parts(name, shape[1:], parallel.expert_tensor)
    ]


def _parts(
    name: str, shape: tuple[int, ...], ranks: int
) -> list[tuple[int | None, tuple[int, ...], tuple[int, ...]]]:
    """Tensor rank (None: all), offsets and sizes, rank by rank."""
    if _BY_ROWS.search(name) or _GATED.search(name):
        halves = 2 if _GATED.search(name) else 1
        rows = shape[0] // (halves * ranks)
        return [
            (rank, ((half * ranks + rank) * rows, 0), (rows, shape[1]))
            for rank in range(ranks)
            for half in range(halves)
        ]
    if _BY_COLUMNS.search(name):
        columns = shape[1] // ranks
        return [(rank, (0, rank * columns), (shape[0], columns)) for rank in range(ranks)]
    return [(None, (0,) * len(shape), shape)]


def _stage(config: RunConfig, name: str) -> int:
    """The first pipeline stage that holds a tensor (tied embeddings are on the last one, too)."""
    stages = config.parallel.pipeline
    if not name.startswith(LANGUAGE):
        return 0
    if layer := _LAYER.search(name):
        return int(layer[1]) // (config.language.num_layers // stages)
    return 0 if "embedding" in name else stages - 1
