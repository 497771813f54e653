"""What a GPU holds all the time, for some sizes of a job, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.plans.state_bytes import state_bytes, tensor_groups

_WORLDS: Final = (1, 8, 64)


def format_states(config: RunConfig, world: int) -> str:
    """Weights, gradients and optimizer states on the pipeline rank with the most.

    Args:
        config: The run.
        world: Number of ranks; 1 for some usual numbers that the layout allows.
    """
    worlds = (world,) if world > 1 else tuple(size for size in _WORLDS if _divides(config, size))
    return "\n".join(_lines(config, worlds))


def _divides(config: RunConfig, world: int) -> bool:
    parallel = config.active_parallel
    experts = parallel.expert * parallel.expert_tensor
    return all(world % (size * parallel.pipeline) == 0 for size in (parallel.tensor, experts))


def _lines(config: RunConfig, worlds: tuple[int, ...]) -> Iterator[str]:
    groups = tensor_groups(config)
    names = ("weights", "gradients", "optimizer", "sum")
    yield f"{'states per GPU':<16}" + "".join(f"{name:>11}" for name in names)
    for world in worlds:
        fullest = max(state_bytes(config, world, groups), key=lambda states: states.total)
        sizes = (fullest.weights, fullest.gradients, fullest.optimizer, fullest.total)
        label = f"{world} GPU" if world == 1 else f"{world} GPUs"
        yield f"{label:<16}" + "".join(f"{_short(size):>11}" for size in sizes)


def _short(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1024:.2f} KiB"
