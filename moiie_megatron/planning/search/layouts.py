"""The layouts that a run can have on a number of ranks, and why it cannot have the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.config.validate import check_config
from moiie_megatron.planning.hardware import Hardware
from moiie_megatron.planning.plans.plan import MARGIN, gib
from moiie_megatron.planning.plans.plan_report import layout_text
from moiie_megatron.planning.plans.state_bytes import StateBytes, state_bytes, tensor_groups
from moiie_megatron.utils.errors import UserError

_VIRTUAL: Final = (1, 2, 4)
_MICRO_BATCHES: Final = (1, 2, 4, 8)

# What the decoder recomputes, from the least to the most.  Norms and activations of experts are
# left out: they need Transformer Engine's modules, which are not simulated.
_RECOMPUTED: Final[tuple[Mapping[str, Any], ...]] = (
    {},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
)


@dataclass(frozen=True)
class Refused:
    """A layout that cannot be had.

    Attributes:
        layout: One line.
        reason: A sentence.
    """

    layout: str
    reason: str


def layouts(config: RunConfig, world: int, hardware: Hardware) -> Iterator[RunConfig | Refused]:
    """All degrees of parallelism and micro-batch sizes, with the configuration's recomputation.

    Tensor parallelism, of experts too, stays inside a node.  A layout whose weights, gradients and
    optimizer states alone exceed the memory is refused.

    Args:
        config: The run; it is tried with other degrees.
        world: Number of ranks.
        hardware: Its memory, and the size of a node.
    """
    groups = tensor_groups(config)
    for degrees in _degrees(config, world, hardware):
        for size in _micro_batch_sizes(config):
            found = _with_degrees(config, degrees, size)
            try:
                check_config(found, world_size=world)
            except UserError as error:
                yield Refused(_text(found), str(error))
                continue
            reason = _too_large(state_bytes(found, world, groups), hardware)
            yield found if reason is None else Refused(_text(found), reason)


def recomputations(config: RunConfig) -> list[RunConfig]:
    """The layout with less and more recomputation, from the least to the most."""
    kept = {k: v for k, v in config.megatron.items() if not k.startswith("recompute_")}
    # The configuration's own settings stay in the list, in front of those that keep less.
    own = {k: v for k, v in config.megatron.items() if k.startswith("recompute_")}
    choices = [*_RECOMPUTED]
    if own and own not in choices:
        choices.insert(1, own)
    found = []
    for fields in choices:
        changed = config.model_copy(update={"megatron": {**kept, **fields}})
        try:
            check_config(changed)
        except UserError:
            continue  # such as the dense FFNs of a model that has none
        found.append(changed)
    return found


def _degrees(config: RunConfig, world: int, hardware: Hardware) -> Iterator[dict[str, Any]]:
    node = min(world, hardware.ranks_per_node)
    tensors = [n for n in _divisors(node) if config.language.num_attention_heads % n == 0]
    pipelines = [n for n in _divisors(world) if n <= config.language.num_layers]
    experts, expert_tensors = [config.parallel.expert], [config.parallel.expert_tensor]
    if config.has_experts:
        experts = _divisors(config.moe.layout.num_experts)
        expert_tensors = _divisors(node)
    for tensor, pipeline, virtual, expert, expert_tensor in itertools.product(
        tensors, pipelines, _VIRTUAL, experts, expert_tensors
    ):
        has_ranks = world % (tensor * pipeline) == 0
        # Of experts cut finer than the dense part nothing is gained.
        if has_ranks and expert_tensor <= tensor and (virtual == 1 or pipeline > 1):
            yield {
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "expert": expert,
                "expert_tensor": expert_tensor,
            }


def _micro_batch_sizes(config: RunConfig) -> list[int]:
    """With packing a micro-batch is one row, whose length is not changed."""
    own = config.train.micro_batch_size
    return [own] if config.data.packing else sorted({*_MICRO_BATCHES, own})


def _with_degrees(config: RunConfig, degrees: Mapping[str, Any], size: int) -> RunConfig:
    parallel = config.parallel
    stages = degrees["pipeline"] * degrees["virtual_pipeline"]
    given = parallel.pipeline_layers
    changes = {
        **degrees,
        "sequence": parallel.sequence if degrees["tensor"] > 1 else None,
        "pipeline_layers": given if given is not None and len(given) == stages else None,
    }
    return config.model_copy(
        update={
            "parallel": parallel.model_copy(update=changes),
            "train": config.train.model_copy(update={"micro_batch_size": size}),
        }
    )


def _too_large(states: Sequence[StateBytes], hardware: Hardware) -> str | None:
    """Why the states of some pipeline rank alone do not fit; None if they do."""
    rank, held = max(enumerate(states), key=lambda item: item[1].total)
    available = hardware.memory * (1 - MARGIN)
    if held.total <= available:
        return None
    where = "a rank" if len(states) == 1 else f"a rank of pipeline rank {rank}"
    return (
        f"Weights ({gib(held.weights)}), gradients ({gib(held.gradients)}) and optimizer states "
        f"({gib(held.optimizer)}) of {where} are {gib(held.total)}, more than {gib(available)} of "
        f"{gib(hardware.memory)} without the margin of {MARGIN:.0%}."
    )


def _text(config: RunConfig) -> str:
    return layout_text(config).rpartition(", recompute")[0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
