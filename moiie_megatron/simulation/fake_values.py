"""Tensors without values beside tensors with values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

# Collectives for which torch has no rule for fake tensors: they return nothing but a work handle.
_WITHOUT_RULE: Final = (
    torch.ops.c10d.allreduce_coalesced_.default,
    torch.ops.c10d.allgather_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
)


def _masked_select(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask is real, which torch's rule has no use for."""
    if isinstance(mask, FakeTensor):
        return torch.ops.aten.masked_select.default(values, mask)
    with unset_fake_temporarily():
        count = int(mask.expand(values.shape).sum())
    return values.new_empty(count)


def _grouped_mm(rows: torch.Tensor, weights: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Torch's rule takes bf16 alone, its kernels take fp32 too."""
    narrow = (rows.to(torch.bfloat16), weights.to(torch.bfloat16))
    return torch.ops.aten._grouped_mm.default(*narrow, *args, **kwargs).to(rows.dtype)


# In place of torch's own rules for fake tensors.
_RULES: Final[dict[Any, Callable[..., Any]]] = {
    torch.ops.aten.masked_select.default: _masked_select,
    torch.ops.aten._grouped_mm.default: _grouped_mm,
}


class ReadOfFakeValue(RuntimeError):
    """The program reads a number of a tensor that has no values."""


class RealStaysReal(TorchDispatchMode):
    """Runs operations on real tensors alone for real, inside ``FakeTensorMode``.

    Tokens, token types and the experts that tokens are routed to are real: sizes depend on them.
    What is computed of them alone stays real too, so a row count is never a guess.
    """

    def __init__(self) -> None:
        super().__init__()
        self._answer: float | None = None

    @contextmanager
    def answering(self, value: float) -> Iterator[None]:
        """Numbers that are read of fake tensors within the block are this one."""
        self._answer = value
        try:
            yield
        finally:
            self._answer = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for so often that it takes half of the time
        if func.is_view and isinstance(args[0], FakeTensor):
            return _view(func, args, kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is torch.ops.aten._local_scalar_dense.default:
                if self._answer is not None:
                    return self._answer
                raise ReadOfFakeValue(
                    "A step reads a value on the host that the simulation does not know: give it "
                    "one in simulation/substitutes.py."
                )
            if func in _WITHOUT_RULE:
                return FakeWork().boxed()
            rule = _RULES.get(func, func)
            return rule(*args, **kwargs)
        if not tensors:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _view(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A view of a fake tensor, as ``FakeTensorMode`` makes it.

    It looks every operation up by all properties of its tensors, which takes longer than the view
    itself; half of all operations are views, and most are of another part of a buffer each time.
    """
    base = args[0]
    with in_kernel_invocation_manager(base.fake_mode):
        views = func(*args, **kwargs)
    if isinstance(views, torch.Tensor):
        return FakeTensor(base.fake_mode, views, base.fake_device)
    return [FakeTensor(base.fake_mode, view, base.fake_device) for view in views]


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def fake_tensors() -> Iterator[RealStaysReal]:
    """New tensors have shapes and dtypes only."""
    with FakeTensorMode(allow_non_fake_inputs=True), RealStaysReal() as values:
        yield values
