"""Makes stock Megatron-Core run on the CPU over Gloo: every patch is one small function.

Megatron-Core 0.16 says ``cuda`` in four ways: functions of ``torch.cuda``, literal
``device="cuda"`` arguments, ``.cuda()`` calls, and type strings such as
``torch.cuda.FloatTensor``.  Each has one answer here.  Nothing is patched where a GPU is used,
nothing is intercepted per operation (a ``TorchFunctionMode`` would cost some microseconds on
every single call), and all patches are applied once, before the first process group exists.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")
_FACTORIES_LIKE = ("zeros_like", "ones_like", "empty_like", "full_like")

# Modules that hold a literal device="cuda" or torch.device("cuda") on a path that we run.
_MODULES_WITH_LITERAL_DEVICE = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)


def is_applied() -> bool:
    """Whether this process already runs with the patches."""
    return getattr(torch.cuda.current_device, "_moiie_cpu", False)


def apply_cpu_patches() -> None:
    """Patch torch.cuda and Megatron-Core for this process; a second call does nothing.

    Raises:
        RuntimeError: CUDA has been initialised in this process already.
    """
    if is_applied():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("The CPU backend was chosen after CUDA had been initialised.")
    _no_compiler()
    _stand_in_for_torch_cuda()
    _tensors_stay_on_the_cpu()
    _type_strings_name_cuda()
    _literal_devices()
    _gloo_needs_split_sizes_as_numbers()
    _gloo_needs_equal_parts()
    _groups_of_one_exchange_nothing()
    _rng_tracker_uses_the_cpu_generator()


def _no_compiler() -> None:
    """Megatron compiles small functions for the GPU; on the CPU that costs minutes at start."""
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


def _stand_in_for_torch_cuda() -> None:
    """``torch.cuda`` functions that Megatron calls without asking whether there is a GPU."""

    def returns(value: Any) -> Callable[..., Any]:
        """A new function for every name, for the same reason as ``_Event``."""
        return lambda *args, **kwargs: value

    @contextlib.contextmanager
    def no_stream(stream: Any) -> Any:
        yield

    stream = _Stream()
    stand_ins: dict[str, Any] = {
        "current_device": _current_device,
        "set_device": returns(None),
        "synchronize": returns(None),
        "empty_cache": returns(None),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": returns(stream),
        "default_stream": returns(stream),
        "stream": no_stream,
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "memory_allocated": returns(0),
        "max_memory_allocated": returns(0),
        "memory_reserved": returns(0),
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, returns(None))


def _tensors_stay_on_the_cpu() -> None:
    """``tensor.cuda()`` and ``module.cuda()`` keep what they are given."""
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]


def _type_strings_name_cuda() -> None:
    """The optimizers compare ``param.type()`` with ``torch.cuda.FloatTensor`` and its kin."""
    real = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return str(real(self)).replace("torch.", "torch.cuda.", 1)
        return real(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _literal_devices() -> None:
    """Modules that name the device get their own view of ``torch``, whose ``cuda`` is the CPU.

    The view is a module object that shares every attribute with torch; only tensor factories
    and ``torch.device`` differ, so other calls cost exactly what they cost before.
    """
    view = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)

    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = None if kwargs["device"] == "meta" else torch.device("cpu")
                if kwargs["device"] is None:
                    kwargs["device"] = torch.device("meta")
            return function(*args, **kwargs)

        return factory

    for name in _FACTORIES + _FACTORIES_LIKE:
        setattr(view, name, on_cpu(getattr(torch, name)))

    class _Device:
        """``torch.device(...)`` without ever a GPU in it; instance checks still work."""

        def __new__(cls, name: Any = "cpu", *args: Any) -> Any:
            return torch.device("cpu" if "cuda" in str(name) else name)

    view.device = _Device  # type: ignore[attr-defined]
    for name in _MODULES_WITH_LITERAL_DEVICE:
        module = importlib.import_module(name)
        module.torch = view  # type: ignore[attr-defined]


def _gloo_needs_split_sizes_as_numbers() -> None:
    """``maybe_move_tensor_to_cpu(as_numpy=True)`` leaves CPU tensors tensors; Gloo refuses them."""

    def maybe_move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for name in ("moe_utils", "token_dispatcher"):
        module = importlib.import_module(f"megatron.core.transformer.moe.{name}")
        module.maybe_move_tensor_to_cpu = maybe_move  # type: ignore[attr-defined]


def _gloo_needs_equal_parts() -> None:
    """Expert tensor parallelism gathers uneven parts, which NCCL does and Gloo refuses: pad."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
        out = tensor.new_zeros(rows, *tensor.shape[1:])
        out[: len(tensor)] = tensor
        return out

    def gather_uneven(tensor: torch.Tensor, group: Any, sizes: Any = None, *a: Any) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return gather(tensor, group, sizes, *a)
        whole = gather(padded(tensor, max(sizes)), group, None, *a)
        parts = [part[:n] for part, n in zip(whole.split(max(sizes)), sizes, strict=True)]
        return torch.cat(parts)

    def scatter_uneven(tensor: torch.Tensor, group: Any, sizes: Any = None, *a: Any) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return scatter(tensor, group, sizes, *a)
        parts = [padded(part, max(sizes)) for part in tensor.split(list(sizes))]
        return scatter(torch.cat(parts), group, None, *a)[: sizes[group.rank()]]

    mappings._gather_along_first_dim = gather_uneven  # type: ignore[attr-defined]
    mappings._reduce_scatter_along_first_dim = scatter_uneven  # type: ignore[attr-defined]


def _groups_of_one_exchange_nothing() -> None:
    """The distributed optimizer scatters and gathers in place; in a group of one process the
    result is there already, but Gloo copies the whole buffer out and back.
    """
    module: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: torch.Tensor, source: torch.Tensor, **kwargs: Any) -> Any:
            alone = kwargs["group"].size() == 1 and output.data_ptr() == source.data_ptr()
            return None if alone else collective(output, source, **kwargs)

        return call

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(module, name, unless_alone(getattr(module, name)))


def _rng_tracker_uses_the_cpu_generator() -> None:
    """The tensor-parallel RNG tracker swaps generator states; here the CPU generator's."""

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    names = ("megatron.core.tensor_parallel.random", "megatron.core.tensor_parallel")
    for module in (importlib.import_module(name) for name in names):
        for attribute, function in (
            ("_get_cuda_rng_state", get_state),
            ("_set_cuda_rng_state", set_state),
        ):
            if hasattr(module, attribute):
                setattr(module, attribute, function)
    assert "megatron.core.tensor_parallel.random" in sys.modules
