"""What a step reads or does with values, replaced where there are none.

Everything else runs as it is.  A read that is not listed here raises ``ReadOfFakeValue``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import random as parallel_random
from torch._subclasses.fake_tensor import FakeTensor

from torch.utils._python_dispatch import _disable_current_modes

from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.moe.router import ModalityRouter
from moiie_megatron.simulation.fake_values import RealStaysReal
from moiie_megatron.training import step

_INITIALIZERS: Final = ("normal_", "uniform_", "trunc_normal_", "xavier_uniform_", "zeros_", "ones_")

# Gives the experts of tokens, bool (T, E), from the number of the layer and the token types.
Router = Callable[[int, torch.Tensor], torch.Tensor]


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of a module or class have other values within the block."""
    before = {name: vars(owner)[name] for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def building() -> Iterator[None]:
    """Model, data-parallel wrapper and optimizer can be built of fake tensors."""
    with ExitStack() as stack:
        stack.enter_context(_without_random_states())
        stack.enter_context(replaced(torch.nn.Module, to=_converted))
        stack.enter_context(replaced(dist, all_gather_object=_echo))
        stack.enter_context(replaced(torch.nn.init, **dict.fromkeys(_INITIALIZERS, _unchanged)))
        yield


@contextmanager
def stepping(values: RealStaysReal, route: Router) -> Iterator[None]:
    """A step can run on fake tensors.

    Args:
        route: Where tokens go.
    """
    choose = ModalityRouter.choose
    physical = MoIIELayer._physical
    sum_over_ranks = step._sum_over_ranks
    count_tokens = step.count_tokens
    grad_norm = optimizer.get_grad_norm_fp32

    def routed(router: ModalityRouter, hidden_TD: torch.Tensor, types_T: torch.Tensor) -> Any:
        choice = choose(router, hidden_TD, types_T)
        # Cloned by an operation, so that its memory counts like that of the router's own map.
        with _disable_current_modes():
            map_TE = route(router._layer, types_T)
        return choice._replace(routing_map_TE=map_TE.clone())

    def in_physical_order(layer: MoIIELayer, tensor_TE: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor_TE, FakeTensor) or layer.physical_to_logical is None:
            return physical(layer, tensor_TE)
        with _disable_current_modes():
            order = torch.tensor(layer.physical_to_logical)
        return tensor_TE.index_select(1, order)

    def counted(*args: Any) -> Any:
        with _disable_current_modes():
            return count_tokens(*args)

    def normed(*args: Any, **kwargs: Any) -> float:
        with values.answering(1.0):
            return grad_norm(*args, **kwargs)

    def summed(*args: Any) -> torch.Tensor:
        sums = sum_over_ranks(*args)
        with _disable_current_modes():
            return torch.zeros(sums.shape, dtype=sums.dtype)

    with ExitStack() as stack:
        stack.enter_context(_without_random_states())
        stack.enter_context(replaced(ModalityRouter, choose=routed))
        stack.enter_context(replaced(MoIIELayer, _physical=in_physical_order))
        stack.enter_context(replaced(clip_grads, l2_norm_impl=_norm))
        stack.enter_context(replaced(optimizer, get_grad_norm_fp32=normed))
        stack.enter_context(replaced(step, count_tokens=counted, _sum_over_ranks=summed))
        yield


@contextmanager
def _without_random_states() -> Iterator[None]:
    tracker = parallel_random.CudaRNGStatesTracker
    with replaced(tracker, fork=lambda *_: nullcontext()):
        yield


def _norm(chunk_size: int, overflow: Any, tensors: Any, *_: Any) -> tuple[torch.Tensor, None]:
    """The norm of gradients, without reading that of each."""
    norms = [torch.norm(tensor) for tensor in tensors[0]]
    return torch.norm(torch.stack(norms)).reshape(1), None


def _unchanged(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _echo(gathered: list[Any], value: Any, *_: Any, **__: Any) -> None:
    gathered[:] = [value] * len(gathered)


def _converted(module: torch.nn.Module, *_: Any, **options: Any) -> torch.nn.Module:
    """``Module.to``, which cannot exchange the values of fake parameters."""
    dtype = options.get("dtype")
    if dtype is not None:
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                new = torch.nn.Parameter(weight.detach().to(dtype), weight.requires_grad)
                setattr(part, name, new)
    return module
