"""Collectives that NCCL accepts and Gloo refuses, or that cost Gloo a copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

import torch

from moiie_megatron.mcore.patches.patch import Patch


def pass_split_sizes_as_numbers() -> None:
    """Convert split sizes that are on the CPU already to numpy, as those from a GPU are."""

    def maybe_move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for name in ("moe_utils", "token_dispatcher"):
        module: Any = importlib.import_module(f"megatron.core.transformer.moe.{name}")
        module.maybe_move_tensor_to_cpu = maybe_move


def pad_uneven_parts() -> None:
    """Pad the parts of an uneven gather or reduce-scatter to one length."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
        out = tensor.new_zeros(rows, *tensor.shape[1:])
        out[: len(tensor)] = tensor
        return out

    def gather_uneven(tensor: torch.Tensor, group: Any, sizes: Any = None, *a: Any) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return gather(tensor, group, sizes, *a)
        joined = gather(padded(tensor, max(sizes)), group, None, *a)
        parts = [part[:n] for part, n in zip(joined.split(max(sizes)), sizes, strict=True)]
        return torch.cat(parts)

    def scatter_uneven(tensor: torch.Tensor, group: Any, sizes: Any = None, *a: Any) -> Any:
        if sizes is None or len(set(sizes)) == 1:
            return scatter(tensor, group, sizes, *a)
        parts = [padded(part, max(sizes)) for part in tensor.split(list(sizes))]
        return scatter(torch.cat(parts), group, None, *a)[: sizes[group.rank()]]

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = scatter_uneven


def skip_collectives_of_one() -> None:
    """Skip collectives in a group of one process whose result is in place already."""
    module: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: torch.Tensor, source: torch.Tensor, **kwargs: Any) -> Any:
            alone = kwargs["group"].size() == 1 and output.data_ptr() == source.data_ptr()
            return None if alone else collective(output, source, **kwargs)

        return call

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(module, name, unless_alone(getattr(module, name)))


PATCHES: Final = (
    Patch(
        name="split sizes",
        targets=(
            "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
            "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        ),
        reason="It leaves tensors that are on the CPU as they are, and Gloo's all-to-all takes "
        "numbers only (TypeError).",
    ),
    Patch(
        name="uneven parts",
        targets=(
            "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
            "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
        ),
        reason="Expert tensor parallelism gathers parts of different lengths, which NCCL does "
        "and Gloo refuses.",
    ),
    Patch(
        name="collectives of one",
        targets=(
            "megatron.core.distributed.param_and_grad_buffer.dist_all_gather_func",
            "megatron.core.distributed.param_and_grad_buffer.dist_reduce_scatter_func",
        ),
        reason="The distributed optimizer gathers and scatters in place; in a group of one "
        "process Gloo still copies the whole buffer out and back.",
        need_not_shown="It saves time only: results are the same without it.",
    ),
)
