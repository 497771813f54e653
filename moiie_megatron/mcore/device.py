"""The device of a run: chosen once at start, then passed as a value."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Device:
    """Device type and the library for collectives.

    Attributes:
        type: ``cpu`` or ``cuda``.
        collectives: ``gloo`` or ``nccl``.
    """

    type: str
    collectives: str

    @property
    def torch_device(self) -> torch.device:
        """``cpu``, or the GPU that this process was bound to."""
        if self.is_cuda:
            return torch.device(self.type, torch.cuda.current_device())
        return torch.device(self.type)

    @property
    def is_cuda(self) -> bool:
        return self.type == "cuda"


def has_transformer_engine(device: Device) -> bool:
    """Whether Transformer Engine's modules are used: it is installed and the device is a GPU."""
    return device.is_cuda and importlib.util.find_spec("transformer_engine") is not None


def choose_device(wanted: str, local_rank: int) -> Device:
    """Choose CPU or GPU and bind this process to it; for the CPU, patch Megatron-Core.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda`` (``train.device`` of the configuration).
        local_rank: Rank of this process on its node.

    Raises:
        UserError: The node has fewer GPUs than processes.
    """
    # Does not create a CUDA context.
    num_gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        from moiie_megatron.mcore.patches.cpu import apply_cpu_patches

        apply_cpu_patches()
        return Device("cpu", "gloo")
    if local_rank >= num_gpus:
        raise UserError(
            f"train.device is {wanted} and this is process {local_rank} of its node, but the node "
            f"has {num_gpus} GPU(s): start at most {num_gpus} processes per node or use "
            "train.device=cpu."
        )
    torch.cuda.set_device(local_rank)
    return Device("cuda", "nccl")
