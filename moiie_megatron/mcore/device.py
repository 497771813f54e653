"""The device of a run, decided once and passed on as a value."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Device:
    """Where tensors live and which library moves them between processes."""

    type: str  # "cpu" or "cuda"
    collectives: str  # "gloo" or "nccl"

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
    """Whether Transformer Engine's modules are used: it is installed and there is a GPU."""
    return device.is_cuda and importlib.util.find_spec("transformer_engine") is not None


def choose_device(wanted: str, local_rank: int) -> Device:
    """Pick CPU or GPU and bind this process to it; on the CPU this patches Megatron-Core.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda`` (``train.device`` of the configuration).
        local_rank: Number of this process on its node.

    Raises:
        UserError: ``cuda`` was asked for and there is no (or not enough) CUDA devices.
    """
    # Counted through NVML or the runtime without creating a CUDA context.
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
