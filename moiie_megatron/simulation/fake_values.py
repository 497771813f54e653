"""Tensors without values beside tensors with values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Collectives for which torch has no rule for fake tensors: they return nothing but a work handle.
_WITHOUT_RULE: Final = (
    torch.ops.c10d.allreduce_coalesced_.default,
    torch.ops.c10d.allgather_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
)


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
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
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
            return func(*args, **kwargs)
        if not tensors:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


@contextmanager
def fake_tensors() -> Iterator[RealStaysReal]:
    """New tensors have shapes and dtypes only."""
    with FakeTensorMode(allow_non_fake_inputs=True), RealStaysReal() as values:
        yield values
