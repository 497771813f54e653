"""Bytes of weights, gradients and optimizer states of a rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from moiie_megatron.training.state import TrainState


class StateBytes(NamedTuple):
    """Each storage counts once, where it is found first: weights, gradients, optimizer."""

    weights: int
    gradients: int
    optimizer: int


def state_bytes(state: TrainState) -> StateBytes:
    """Count the storages of what a rank keeps between steps.

    Args:
        state: After its first step, which makes the moments.
    """
    seen: set[int] = set()

    def size(tensors: Iterable[torch.Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
        return total

    buffers = [
        buffer
        for wrapper in state.ddp
        for buffer in (*wrapper.buffers, *wrapper.expert_parallel_buffers)
    ]
    weights = [*state.model.parameters(), *state.model.buffers()]
    weights += [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    return StateBytes(
        weights=size(weights),
        gradients=size(buffer.grad_data for buffer in buffers),
        optimizer=size(tensor for part in _parts(state) for tensor in _optimizer_tensors(part)),
    )


def make_moments(state: TrainState) -> None:
    """Let the optimizer make its moments, which it otherwise makes in the first step."""
    for part in _parts(state):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.numel():
                    parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()
        part.optimizer.zero_grad()


def _parts(state: TrainState) -> list[Any]:
    return list(state.optimizer.chained_optimizers)


def _optimizer_tensors(part: Any) -> Iterable[torch.Tensor]:
    for group in part.optimizer.param_groups:
        yield from group["params"]
    for values in part.optimizer.state.values():
        for name, value in values.items():
            # The number of steps is a tensor of the host, or none, whatever the device.
            if isinstance(value, torch.Tensor) and name != "step":
                yield value
