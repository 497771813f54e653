"""Functions of torch, and of Megatron-Core around them, that assume a GPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, Final

import torch

from moiie_megatron.mcore.patches.patch import Patch


def is_applied() -> bool:
    """Whether this process already runs with the CPU patches."""
    return getattr(torch.cuda.current_device, "_moiie_cpu", False)


def disable_compiler() -> None:
    """Run Megatron's small compiled functions as plain Python."""
    importlib.import_module("megatron.core.jit").disable_jit_fuser()
    torch.compiler.set_stance("force_eager")  # for those compiled when they were imported


class _Stream:
    """Streams and events order GPU work; on the CPU everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event(_Stream):
    """A class of its own: torch's compiler keeps a table of these objects without duplicates."""


def _current_device() -> torch.device:
    return torch.device("cpu")


_current_device._moiie_cpu = True  # type: ignore[attr-defined]


def replace_cuda_functions() -> None:
    """Replace the functions of ``torch.cuda`` that Megatron calls without asking for a GPU."""

    def returns(value: Any) -> Callable[..., Any]:
        """A new function for every name, for the same reason as ``_Event``."""
        return lambda *args, **kwargs: value

    @contextlib.contextmanager
    def no_stream(stream: Any) -> Any:
        yield

    stream = _Stream()
    replacements: dict[str, Any] = {
        "current_device": _current_device,
        "set_device": returns(None),
        "synchronize": returns(None),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": returns(stream),
        "default_stream": returns(stream),
        "stream": no_stream,
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
    }
    assert tuple(replacements) == CUDA_FUNCTIONS
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    for name in NVTX_FUNCTIONS:
        setattr(torch.cuda.nvtx, name, returns(None))


def keep_tensors_on_cpu() -> None:
    """Let ``tensor.cuda()`` and ``module.cuda()`` return what they are called on."""
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]


def report_cuda_type_strings() -> None:
    """Let ``param.type()`` read ``torch.cuda.FloatTensor``, which the optimizers compare with."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return str(original(self)).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def track_cpu_generator() -> None:
    """Let the tensor-parallel RNG tracker save and restore the CPU generator's state."""

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    module: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    module._get_cuda_rng_state = get_state
    module._set_cuda_rng_state = set_state


CUDA_FUNCTIONS: Final = (
    "current_device",
    "set_device",
    "synchronize",
    "Stream",
    "Event",
    "current_stream",
    "default_stream",
    "stream",
    "manual_seed",
    "get_rng_state",
    "set_rng_state",
)
NVTX_FUNCTIONS: Final = ("range_push", "range_pop", "mark")

PATCHES: Final = (
    Patch(
        name="compiler",
        targets=("megatron.core.jit.disable_jit_fuser", "torch.compiler.set_stance"),
        reason="Megatron-Core compiles small functions for the GPU; on the CPU compiling them "
        "costs minutes at the start of a run.",
    ),
    Patch(
        name="cuda functions",
        targets=tuple(f"torch.cuda.{name}" for name in CUDA_FUNCTIONS),
        reason="Megatron-Core calls them without asking whether there is a GPU.  Most raise; "
        "manual_seed and set_rng_state only note the request for later, and stream fails on a "
        "machine that has a GPU which the run does not use.",
    ),
    Patch(
        name="nvtx",
        targets=tuple(f"torch.cuda.nvtx.{name}" for name in NVTX_FUNCTIONS),
        reason="They raise in a CPU build of torch.",
    ),
    Patch(
        name="tensor.cuda()",
        targets=("torch.Tensor.cuda", "torch.nn.Module.cuda"),
        reason="Megatron-Core moves tensors and modules to the GPU unconditionally.",
    ),
    Patch(
        name="type strings",
        targets=("torch.Tensor.type",),
        reason="Megatron-Core's optimizers sort parameters by strings such as "
        "torch.cuda.FloatTensor and refuse every other.",
    ),
    Patch(
        name="rng tracker",
        targets=(
            "megatron.core.tensor_parallel.random._get_cuda_rng_state",
            "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        ),
        reason="The tracker reads the generators of CUDA, which do not exist.",
    ),
)
