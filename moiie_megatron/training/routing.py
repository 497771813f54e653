"""What the routers of the whole model did, from the counters of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from moiie_megatron.backend.parallel import World
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.moe.load_stats import LoadStats
from moiie_megatron.multimodal.model import MoIIEModel


@dataclass(frozen=True)
class RoutingSummary:
    """Routing since the last summary, alike on every rank; empty for a dense model.

    Attributes:
        aux: Balance loss by router: the mean over layers and micro-batches, which alpha weighs.
        z: Z-loss by router, the same mean; empty without z-losses.
        expert_share: By layer number and router, the share of the router's tokens that each
            expert got (logical order; adds up to top-k).
        rows_per_token: By router, rows that the MoIIE dispatcher makes of one token: one per
            expert-parallel rank that holds one of its experts (mean over layers).
        remote_rows_per_token: Those of them that go to another rank.
    """

    aux: dict[str, float] = field(default_factory=dict)
    z: dict[str, float] = field(default_factory=dict)
    expert_share: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    rows_per_token: dict[str, float] = field(default_factory=dict)
    remote_rows_per_token: dict[str, float] = field(default_factory=dict)


def routing_summary(
    config: RunConfig, world: World, model: MoIIEModel, micro_batches: int
) -> RoutingSummary:
    """Reduce and reset the counters of all layers; every rank calls this.

    Args:
        micro_batches: Micro-batches of all data-parallel ranks since the last call.
    """
    layers, layout = config.moe_layers, config.moe.layout
    if not layers:
        return RoutingSummary()
    routers, experts = layout.routers, layout.num_experts
    width = LoadStats(len(routers), experts, torch.device("cpu")).packed().numel()
    sums = torch.zeros(len(layers), width, device=world.device.torch_device)
    for number, counters in _counters(model):
        sums[layers.index(number)] = counters.packed()
        counters.reset()
    # Ranks hold other tokens (data and sequence parallelism) or other layers (pipeline).
    dist.all_reduce(sums)
    by_layer = [LoadStats.unpack(row, len(routers), experts) for row in sums.double().cpu()]
    total = {name: sum(stats[name] for stats in by_layer) for name in by_layer[0]}

    def by_router(values: torch.Tensor) -> dict[str, float]:
        return dict(zip(routers, values.tolist(), strict=True))

    spread = config.active_parallel.expert > 1
    count = len(layers) * micro_batches
    tokens_R = total["tokens_R"].clamp(min=1)
    shares = {
        str(number): {
            name: (stats["load_RE"][i] / stats["tokens_R"][i].clamp(min=1)).tolist()
            for i, name in enumerate(routers)
        }
        for number, stats in zip(layers, by_layer, strict=True)
    }
    return RoutingSummary(
        aux=by_router(total["aux_R"] / count),
        z=by_router(total["z_R"] / count) if config.moe.z_loss_coeff else {},
        expert_share=shares,
        # Counted where rows travel; on one rank every token is one row.
        rows_per_token=by_router(total["rows_R" if spread else "tokens_R"] / tokens_R),
        remote_rows_per_token=by_router(total["remote_R"] / tokens_R),
    )


def _counters(model: MoIIEModel) -> Iterator[tuple[int, LoadStats]]:
    """Layer numbers (from 0) of this pipeline stage and their counters."""
    for layer in model.language_model.decoder.layers:
        if isinstance(layer.mlp, MoIIELayer):
            yield layer.layer_number - 1, layer.mlp.router.stats
