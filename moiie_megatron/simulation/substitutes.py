"""What a step reads or does with values, replaced where there are none.

Everything else runs as it is.  A read that is not listed here raises ``ReadOfFakeValue``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch._subclasses.fake_tensor import unset_fake_temporarily

from moiie_megatron.simulation.fake_values import RealStaysReal
from moiie_megatron.training import step
from moiie_megatron.utils.replaced import replaced

# What torch's initialisers end in: libraries keep references to the initialisers themselves.
_INITIALIZERS: Final = (
    "_no_grad_uniform_",
    "_no_grad_normal_",
    "_no_grad_trunc_normal_",
    "_no_grad_fill_",
    "_no_grad_zero_",
)

Shape = tuple[int, int, int]


@contextmanager
def building() -> Iterator[None]:
    """Model, data-parallel wrapper and optimizer can be built of fake tensors."""
    with ExitStack() as stack:
        stack.enter_context(_without_random_states())
        stack.enter_context(replaced(torch.nn.Module, to=_converted))
        stack.enter_context(replaced(dist, all_gather_object=_echo))
        dispatcher = MoEAlltoAllTokenDispatcher
        stack.enter_context(replaced(dispatcher, __init__=_with_values(dispatcher.__init__)))
        stack.enter_context(replaced(torch.nn.init, **dict.fromkeys(_INITIALIZERS, _unchanged)))
        yield


@contextmanager
def stepping(values: RealStaysReal, shapes: Sequence[Shape]) -> Iterator[None]:
    """A step can run on fake tensors.

    Args:
        values: Answers reads of fake tensors.
        shapes: ``(s, b, h)`` of what pipeline stages send each other, by micro-batch.
    """
    sum_over_ranks, count_tokens = step._sum_over_ranks, step.count_tokens
    norm_of = optimizer.get_grad_norm_fp32
    exchange_shapes = P2PCommunicator._communicate_shapes
    from_previous, from_next = itertools.cycle(shapes), itertools.cycle(shapes)

    def counted(*args: Any) -> Any:
        with unset_fake_temporarily():
            return count_tokens(*args)

    def summed(*args: Any) -> torch.Tensor:
        sums = sum_over_ranks(*args)
        with unset_fake_temporarily():
            return torch.zeros(sums.shape, dtype=sums.dtype)

    def grad_norm(*args: Any, **kwargs: Any) -> float:
        with values.answering(1.0):
            return norm_of(*args, **kwargs)

    def received_shapes(
        communicator: Any, to_next: Any, to_previous: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape | None, Shape | None]:
        with values.answering(0):
            exchange_shapes(communicator, to_next, to_previous, recv_prev, recv_next)
        return (
            next(from_previous) if recv_prev else None,
            next(from_next) if recv_next else None,
        )

    with ExitStack() as stack:
        stack.enter_context(_without_random_states())
        stack.enter_context(replaced(step, count_tokens=counted, _sum_over_ranks=summed))
        stack.enter_context(replaced(clip_grads, l2_norm_impl=_norm))
        stack.enter_context(replaced(optimizer, get_grad_norm_fp32=grad_norm))
        stack.enter_context(replaced(P2PCommunicator, _communicate_shapes=received_shapes))
        yield


@contextmanager
def _without_random_states() -> Iterator[None]:
    with replaced(CudaRNGStatesTracker, fork=lambda *_: nullcontext()):
        yield


def _norm(chunk_size: int, overflow: Any, tensors: Any, *_: Any) -> tuple[torch.Tensor, None]:
    """The norm of gradients, without reading that of each."""
    norms = [torch.norm(tensor) for tensor in tensors[0]]
    return torch.norm(torch.stack(norms)).reshape(1), None


def _with_values(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose tensors are real: the alltoall dispatcher's order of experts is read."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return method(*args, **kwargs)

    return call


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
