"""What the routers of the whole model did, summed over its layers' counters and over ranks.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.config import torch_dtype
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.routing_stats.load_stats import LayerSums, LoadStats, routing_size
from moiie_megatron.routing_stats.record import routing_record

_FP32_BYTES = 4


@dataclass(frozen=True)
class RouterLosses:
    """Means over layers and over micro-batches since the last report, equal on every rank.

    A router's mean is over the micro-batches with tokens of its modality; 0 where none had any.

    Attributes:
        aux: Balance loss by router, before its coefficient; empty for a dense model.
        z: Z-loss by router, before its coefficient; empty without z-losses.
    """

    aux: dict[str, float] = field(default_factory=dict)
    z: dict[str, float] = field(default_factory=dict)


class RoutingCounters:
    """The counters of all MoE layers, reduced over all ranks; every rank makes the same calls.

    Layers count on their device in every step.  Nothing is reduced, and the host does not sync
    with the device, until ``losses`` or ``record`` is called; each resets what it returned.

    Args:
        model: This rank's part of the model.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, model: torch.nn.Module) -> None:
        self.config = config
        self.context = context
        self.layers = config.moe_layers
        self.stats = dict(_stats(model))
        self.micro_batches = 0
        self.steps = 0

    def count_step(self, micro_batches: int) -> None:
        """Note an optimizer step.

        Args:
            micro_batches: Of all data-parallel ranks.
        """
        self.micro_batches += micro_batches
        self.steps += 1

    def losses(self) -> RouterLosses:
        """The losses since the last call (one reduction of a few numbers)."""
        if not self.layers:
            return RouterLosses()
        routers = self.config.moe.layout.routers
        sums = self._zeros(3 * len(routers))
        for stats in self.stats.values():  # a pipeline stage may have no MoE layer
            sums += torch.cat([stats.losses(), stats.empty_G])
        dist.all_reduce(sums)
        losses, empty_G = sums.split([2 * len(routers), len(routers)])
        # Parts of ranks that share a micro-batch add up to one but for rounding.
        counted_G = (len(self.layers) * self.micro_batches - empty_G).round().clamp(min=1.0)
        means = (losses / counted_G.repeat(2)).tolist()
        self.micro_batches = 0
        for stats in self.stats.values():
            stats.reset_losses()
        aux, z = means[: len(routers)], means[len(routers) :]
        return RouterLosses(
            dict(zip(routers, aux, strict=True)),
            dict(zip(routers, z, strict=True)) if self.config.moe.z_loss_coeff else {},
        )

    def record(self) -> dict[str, Any] | None:
        """The routing since the last call (one reduction to rank 0).

        Returns:
            On rank 0 what ``record.py`` describes, with ``steps``; None on other ranks and for a
            dense model.
        """
        steps, self.steps = self.steps, 0
        if not self.layers:
            return None
        experts = self.config.moe.layout.num_experts
        sums = self._zeros(len(self.layers), routing_size(experts))
        for number, stats in self.stats.items():
            sums[self.layers.index(number)] = stats.routing()
            stats.reset_routing()
        # Ranks hold different tokens (data and sequence parallelism) or layers (pipeline).
        dist.reduce(sums, dst=0)
        if self.context.rank != 0:
            return None
        layers = {
            number: LayerSums.from_vector(row, experts)
            for number, row in zip(self.layers, sums.cpu(), strict=True)
        }
        config = self.config
        record = routing_record(layers, config.moe.layout, config.placement, row_bytes(config))
        return {"steps": steps, **record}

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.context.device.torch_device)


def row_bytes(config: RunConfig) -> int:
    """Bytes of one row of the dispatcher between two ranks, forward and backward pass together.

    Hidden states travel there and back in the dtype of the run, on the way there with the fp32
    probabilities of the destination's experts (``alltoall``: of one expert); the backward pass
    sends gradients of the same shapes the other way.  ``allgather`` sends the probabilities of
    all experts, a byte of routing map for each, and combines in fp32.
    """
    moe, width = config.moe, config.language.hidden_size
    dtype = torch_dtype(config)
    there = back = width * dtype.itemsize
    if moe.dispatcher == "allgather":
        experts = moe.layout.num_experts
        return 2 * (there + experts * _FP32_BYTES + width * _FP32_BYTES) + experts
    per_row = (
        1
        if moe.dispatcher == "alltoall"
        else moe.layout.num_experts // (config.active_parallel.expert)
    )
    return 2 * (there + per_row * _FP32_BYTES + back)


def _stats(model: torch.nn.Module) -> Iterator[tuple[int, LoadStats]]:
    """Layer numbers (from 0) of this pipeline stage and the counters of their routers."""
    for module in model.modules():
        stats = getattr(module, "stats", None)
        if isinstance(stats, LoadStats):
            number: Any = module.layer_number  # counts from 1
            yield number - 1, stats
