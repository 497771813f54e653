"""What differs between a run on GPUs and its simulation, which is one on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.config import overlaps_grad_reduce
from moiie_megatron.mcore.device import Device
from moiie_megatron.moe import grouped_mlp
from moiie_megatron.moe.expert_ffn import grouped_ffn
from moiie_megatron.utils.replaced import replaced


def as_on_gpus(config: RunConfig) -> RunConfig:
    """The run with the defaults that it has on GPUs written out.

    Its device is the CPU: a fake tensor of a GPU needs a build of torch for GPUs.
    """
    gpu = Device("cuda", "nccl")
    overlap = overlaps_grad_reduce(config, gpu)
    ddp = {
        "overlap_grad_reduce": overlap,
        "overlap_param_gather": overlap and config.optimizer.distributed,
    }
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"device": "cpu"}),
            "ddp": ddp | config.ddp,
            "megatron": {"bias_activation_fusion": True} | config.megatron,
        }
    )


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """All experts of a rank run in one kernel, as on a GPU, instead of one after the other."""
    with replaced(grouped_mlp, expert_ffn=grouped_ffn):
        yield
