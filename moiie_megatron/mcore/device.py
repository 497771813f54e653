"""The device of a run: chosen once at start, then passed as a value."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from moiie_megatron.mcore.gpu_environment import prepare_gpu_environment
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Device:
    """Device type, the library for collectives, and whose modules the model is built of.

    Attributes:
        type: ``cpu`` or ``cuda``.
        collectives: ``gloo`` or ``nccl``.
        transformer_engine: Whether Transformer Engine's modules are used, else local ones.
    """

    type: str
    collectives: str
    transformer_engine: bool = False

    @property
    def torch_device(self) -> torch.device:
        """``cpu``, or the GPU that this process was bound to."""
        if self.is_cuda:
            return torch.device(self.type, torch.cuda.current_device())
        return torch.device(self.type)

    @property
    def is_cuda(self) -> bool:
        return self.type == "cuda"

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on this device; the host does not wait for the copy."""
        if self.is_cuda:
            tensor = tensor.pin_memory()  # from other memory CUDA may wait; pinned ones stay
        return tensor.to(self.torch_device, non_blocking=True)


def choose_device(wanted: str, local_rank: int, transformer_impl: str = "auto") -> Device:
    """Choose CPU or GPU and bind this process to it; for the CPU, patch Megatron-Core.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda`` (``train.device`` of the configuration).
        local_rank: Rank of this process on its node.
        transformer_impl: ``auto``, ``local`` or ``transformer_engine``
            (``train.transformer_impl`` of the configuration).

    Raises:
        UserError: There is no GPU though one is asked for or torch is built for CUDA, the node has
            fewer GPUs than processes, or Transformer Engine is asked for and cannot be used.
    """
    # Does not create a CUDA context.
    num_gpus = torch.cuda.device_count()
    # A job that is meant for GPUs must not begin on the CPU because a driver is too old.
    needs_gpu = wanted == "cuda" or (wanted == "auto" and torch.version.cuda is not None)
    if num_gpus == 0 and needs_gpu:
        cause = f"torch {torch.__version__} is built without CUDA"
        if torch.version.cuda is not None:
            cause = (
                f"the driver may be too old for CUDA {torch.version.cuda}, the container may have "
                "been started without --gpus, or CUDA_VISIBLE_DEVICES may hide them"
            )
        raise UserError(
            f"train.device is {wanted} and torch finds 0 GPU(s): {cause}; mend that or use "
            "train.device=cpu."
        )
    if num_gpus == 0 or wanted == "cpu":
        from moiie_megatron.mcore.patches.cpu import apply_cpu_patches

        apply_cpu_patches()
        return Device("cpu", "gloo", _use_transformer_engine("cpu", transformer_impl))
    if local_rank >= num_gpus:
        raise UserError(
            f"train.device is {wanted} and this is process {local_rank} of its node, but the node "
            f"has {num_gpus} GPU(s): start at most {num_gpus} processes per node or use "
            "train.device=cpu."
        )
    prepare_gpu_environment()
    torch.cuda.set_device(local_rank)
    return Device("cuda", "nccl", _use_transformer_engine("cuda", transformer_impl))


def _use_transformer_engine(device: str, wanted: str) -> bool:
    if wanted == "local":
        return False
    can_run = _can_run_transformer_engine(device)
    if wanted == "transformer_engine" and not can_run:
        raise UserError(
            f"train.transformer_impl is transformer_engine, which needs a GPU and an installed "
            f"Transformer Engine (device: {device}, importable: {HAVE_TE}): use the image of "
            "docker/, or train.transformer_impl=local."
        )
    if device == "cuda" and not HAVE_TE and importlib.util.find_spec("transformer_engine"):
        logging.getLogger(__name__).warning(
            "Transformer Engine is installed but cannot be imported; the model uses local modules."
        )
    return can_run


def _can_run_transformer_engine(device: str) -> bool:
    return HAVE_TE and device == "cuda"
