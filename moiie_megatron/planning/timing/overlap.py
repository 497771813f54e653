"""Which communication a run can hide behind its computation."""

from __future__ import annotations

from dataclasses import dataclass

from moiie_megatron.config.megatron_section.sections import ddp_fields
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.hardware import Hardware


@dataclass(frozen=True)
class Overlap:
    """What a run starts while it computes.

    Attributes:
        gradients: Their reduction, during the backward pass.
        weights: Their gather, during the next forward pass.
        sends: Between interleaved pipeline stages.
    """

    gradients: bool
    weights: bool
    sends: bool


def overlap_of(config: RunConfig, hardware: Hardware) -> Overlap:
    """What a run overlaps by its ``ddp`` section and its pipeline schedule.

    The defaults are on for GPUs (``mcore/config.py``).
    """
    fields = ddp_fields(config)
    on_gpus = hardware.cores is None
    gradients = bool(fields.get("overlap_grad_reduce", on_gpus))
    default = on_gpus and gradients and config.optimizer.distributed
    return Overlap(
        gradients=gradients,
        weights=bool(fields.get("overlap_param_gather", default)),
        sends=config.parallel.virtual_pipeline > 1,
    )
