"""Modules of Megatron-Core that name the device: ``device="cuda"``, ``torch.device("cuda")``."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any, Final

import torch

from moiie_megatron.mcore.patches.patch import Patch

_FACTORIES = (
    *("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)


def redirect_literal_devices() -> None:
    """Give those modules their own view of ``torch``, in which every GPU is the CPU.

    The view is a module object that shares every attribute with torch; only tensor factories
    and ``torch.device`` differ, so other calls cost exactly what they cost before.
    """
    view: Any = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)
    for name in _FACTORIES:
        setattr(view, name, _on_cpu(getattr(torch, name)))
    view.device = _CPUDevice
    for name in MODULES_WITH_LITERAL_DEVICE:
        module: Any = importlib.import_module(name)
        module.torch = view


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The same tensor factory; whatever device it is asked for is the CPU, but for ``meta``."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device", "meta") != "meta":
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return on_cpu


class _CPUDevice:
    """Stands in for the class ``torch.device``: the CPU whenever a GPU is asked for."""

    def __new__(cls, name: Any = "cpu", *args: Any) -> Any:
        return torch.device("cpu" if "cuda" in str(name) else name)


# Those on a path that the project runs.
MODULES_WITH_LITERAL_DEVICE: Final = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)

PATCHES: Final = (
    Patch(
        name="literal devices",
        targets=tuple(f"{module}.torch" for module in MODULES_WITH_LITERAL_DEVICE),
        reason="They make tensors on a literal cuda device.",
    ),
)
