"""What the routers of the whole model did, from the counters of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.config import torch_dtype
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.routing_stats.load_stats import LoadStats, routing_shapes, unpack
from moiie_megatron.routing_stats.record import LayerSums, routing_record
from moiie_megatron.vlm.model import MoIIEModel

_FP32_BYTES = 4


@dataclass(frozen=True)
class RouterLosses:
    """Means over layers and micro-batches since the last ones, alike on every rank.

    Attributes:
        aux: Balance loss by router, which alpha weighs; empty for a dense model.
        z: Z-loss by router; empty without z-losses.
    """

    aux: dict[str, float] = field(default_factory=dict)
    z: dict[str, float] = field(default_factory=dict)


class RoutingCounters:
    """The counters of all MoE layers, over all ranks; every rank makes the same calls.

    Layers count on their device in every step.  Nothing is reduced, and the host waits for
    nothing, until ``losses`` or ``record`` is called; each starts over with what it returned.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, model: MoIIEModel) -> None:
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
        """One reduction of a few numbers."""
        if not self.layers:
            return RouterLosses()
        routers = self.config.moe.layout.routers
        sums = self._zeros(2 * len(routers))
        if self.stats:  # a pipeline stage may have no MoE layer
            sums = torch.stack([stats.losses() for stats in self.stats.values()]).sum(dim=0)
        dist.all_reduce(sums)
        means = (sums / (len(self.layers) * max(self.micro_batches, 1))).tolist()
        self.micro_batches = 0
        for stats in self.stats.values():
            stats.reset_losses()
        aux, z = means[: len(routers)], means[len(routers) :]
        return RouterLosses(
            dict(zip(routers, aux, strict=True)),
            dict(zip(routers, z, strict=True)) if self.config.moe.z_loss_coeff else {},
        )

    def record(self) -> dict[str, Any] | None:
        """One reduction to rank 0.

        Returns:
            On rank 0 what ``routing_stats/record.py`` describes, with ``steps``; None on other
            ranks and for a dense model.
        """
        steps, self.steps = self.steps, 0
        if not self.layers:
            return None
        experts = self.config.moe.layout.num_experts
        width = sum(shape.numel() for shape in map(torch.Size, routing_shapes(experts).values()))
        sums = self._zeros(len(self.layers), width)
        for number, stats in self.stats.items():
            sums[self.layers.index(number)] = stats.routing()
            stats.reset_routing()
        # Ranks hold other tokens (data and sequence parallelism) or other layers (pipeline).
        dist.reduce(sums, dst=0)
        if self.context.rank != 0:
            return None
        layers = {
            number: _layer_sums(unpack(row, experts))
            for number, row in zip(self.layers, sums.cpu(), strict=True)
        }
        config = self.config
        record = routing_record(layers, config.moe.layout, config.placement, row_bytes(config))
        return {"steps": steps, **record}

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.context.device.torch_device)


def row_bytes(config: RunConfig) -> int:
    """Bytes of one row of the dispatcher between two ranks, forward and backward pass together.

    Hidden states go there and back in the dtype of the run, with them the fp32 probabilities of
    the destination's experts (``alltoall``: of one expert); the backward pass sends gradients of
    the same shapes the other way.  ``allgather`` sends all probabilities with a byte of routing
    map for each and combines in fp32, the dtype of the probabilities.
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


def _layer_sums(sums: dict[str, torch.Tensor]) -> LayerSums:
    def counts(name: str) -> Any:
        return sums[name].round().long().tolist()

    return LayerSums(
        tokens=counts("tokens_M"),
        load=counts("load_ME"),
        prob=sums["prob_ME"].tolist(),
        rows=counts("rows_A"),
        remote=counts("remote_A"),
    )


def _stats(model: MoIIEModel) -> Iterator[tuple[int, LoadStats]]:
    """Layer numbers (from 0) of this pipeline stage and their counters."""
    for layer in model.language_model.decoder.layers:
        if isinstance(layer.mlp, MoIIELayer):
            yield layer.layer_number - 1, layer.mlp.router.stats
