"""Where a program would make the host wait for a GPU, found on the CPU."""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.launch import ROOT

PACKAGE = ROOT / "moiie_megatron"
PATCHES = PACKAGE / "mcore" / "patches"
# The size of the result, or a number for Python, is known on the device only.
OPERATORS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter_backward",
    "unique2",
)
# Copies to the host; of a tensor on the CPU no operator runs.
METHODS = ("cpu", "tolist", "numpy")
# Waits of the host for work on the device; stand-ins on the CPU (mcore/patches/cpu_torch.py).
WAITS = (("Event", "synchronize"), ("Stream", "synchronize"))


class HostSyncs:
    """Counts of the places that wait, as ``file: source line: operator``.

    Methods are replaced and not seen by a mode, which is off in what autograd calls.

    Places outside the package count as the line of the package that has led there, and those of
    a backward pass, which autograd calls, as ``backward``.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        self.counts[f"{_place(sys._getframe(2))}: {name}"] += 1

    @contextmanager
    def recorded(self) -> Iterator[HostSyncs]:
        places = [(torch.Tensor, name) for name in (*METHODS, "to")]
        places += [(getattr(torch.cuda, owner), name) for owner, name in WAITS]
        with ExitStack() as stack:
            for owner, name in places:
                original = getattr(owner, name)
                # Puts back what the class inherits.
                stack.enter_context(patch.object(owner, name, _counted(name, original, self.add)))
            stack.enter_context(_Operators(self.add))
            yield self


class _Operators(TorchDispatchMode):
    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__()
        self.add = add

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATORS or (name.startswith("index") and _has_mask(args)):
            self.add(name)
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    """Whether elements are picked by booleans, so that their number decides the shape.

    Setting all of them to one number is a ``masked_fill`` to the GPU, which does not wait.
    """
    if len(args) > 2 and args[2].numel() == 1:
        return False
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _counted(
    name: str, original: Callable[..., Any], add: Callable[[str], None]
) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        # The device of a run is "cpu" here too, but as a torch.device.
        if name != "to" or ("cpu" in args[1:] and not kwargs.get("non_blocking")):
            add(name)
        return original(*args, **kwargs)

    return method


def _place(frame: FrameType | None) -> str:
    """The innermost line of the package on the stack, unless autograd lies in between."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name == "graph.py" and frame.f_code.co_name == "_engine_run_backward":
            return "backward"
        # Patches stand between two functions of Megatron-Core.
        if path.is_relative_to(PACKAGE) and not path.is_relative_to(PATCHES):
            line = linecache.getline(str(path), frame.f_lineno).strip()
            return f"{path.relative_to(PACKAGE)}: {line}"
        frame = frame.f_back
    return "elsewhere"
