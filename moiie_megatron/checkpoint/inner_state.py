"""The state of a parameter in the optimizers that Megatron-Core's distributed optimizer wraps.

All of them hold fp32 weights and Adam's two moments.  torch's AdamW keeps them as they are, as do
Transformer Engine's and Apex's; Transformer Engine's in the dtypes of one's choice where Megatron
is precision-aware, and Megatron's hybrid optimizer in host memory.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

# The names in checkpoints, where ``param`` is the fp32 weights.
_NAMES = ("param", "exp_avg", "exp_avg_sq")


def begin_state(optimizer: Any) -> None:
    """Give an optimizer that has not updated anything yet the state that its first update expects.

    The moments are zeros and the number of steps is 0, as the optimizers themselves begin; with a
    state from an update nothing changes.  Needed before a save, since Megatron-Core asserts that
    there is a number of steps, and before a load, which otherwise makes up an update.

    Args:
        optimizer: Megatron's chained optimizer, distributed.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if inner is None or inner.state:
            continue
        if isinstance(inner, HybridDeviceOptimizer):
            for device_optimizer in inner.sub_optimizers:
                _begin_moments(device_optimizer)
            inner._sync_sub_optimizers_state_to_hdo()
        elif part.config.use_precision_aware_optimizer:
            for parameter in _parameters(inner):
                inner.initialize_state(parameter, False)
        else:
            part.init_state_fn(inner, part.config)
            _begin_steps(inner)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _begin_moments(optimizer: torch.optim.Optimizer) -> None:
    for parameter in _parameters(optimizer):
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][name] = torch.zeros_like(parameter)
    _begin_steps(optimizer)


def _begin_steps(optimizer: torch.optim.Optimizer) -> None:
    """Only torch's AdamW has them here; the others count in the parameter groups."""
    if isinstance(optimizer, torch.optim.AdamW):
        for parameter, values in optimizer.state.items():
            values["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def read_state(part: Any, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """fp32 weights and moments of what a rank owns of a parameter, flat.

    They are the optimizer's own tensors, or copies where it keeps another dtype: what is written
    to them has an effect after ``take_over``.

    Args:
        part: One ``DistributedOptimizer``.
        parameter: One of its parameters.
    """
    state = part._get_main_param_and_optimizer_states(parameter)
    return {name: state[name] for name in _NAMES}


def take_over(part: Any, states: dict[torch.nn.Parameter, dict[str, Tensor]]) -> None:
    """Let an optimizer go on with states that were read into the tensors of ``read_state``.

    Args:
        part: One ``DistributedOptimizer``.
        states: All its parameters with their tensors.
    """
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer._sync_hdo_state_to_sub_optimizers()
    elif part.config.use_precision_aware_optimizer:
        for parameter, tensors in states.items():
            part._set_main_param_and_optimizer_states(parameter, tensors)
