"""The process groups, and the collectives that training uses: right values, then bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.dist_env import connect_store
from moiie_megatron.mcore.parallel import init_parallel
from moiie_megatron.selftest.check import Finding, Session, failed, passed
from moiie_megatron.selftest.checks.models import expert_parallel
from moiie_megatron.utils.timing import interleave, slower_rank

_WIDTH: Final = 8  # columns of the rows that are exchanged


def start_groups(session: Session) -> Finding:
    """Set up the process groups and the device."""
    size = session.dist_env.world_size
    degree = expert_parallel(size)
    session.context = init_parallel(
        ParallelConfig(expert=degree),
        session.dist_env,
        device=session.device,
        store=dist.PrefixStore("groups", connect_store(session.dist_env)),
    )
    device = session.context.device
    modules = "Transformer Engine's" if device.transformer_engine else "local"
    return passed(
        f"{size} process(es) over {device.collectives}, EP {degree}, {modules} modules",
        ranks=size,
        expert_parallel=degree,
        transformer_engine=device.transformer_engine,
    )


def check_collectives(session: Session) -> Finding:
    """Every collective of training, with values that only the right result has."""
    device = session.groups.device.torch_device
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for name, values in VALUES.items():
            found, wanted = values(session.groups.rank, session.groups.size, device, dtype)
            if not torch.equal(found.cpu(), wanted):
                return failed(f"{name} of {dtype} gives wrong values")
    rates = _bandwidth(session)
    if not rates:
        return passed("right values; a single process sends nothing, so there is no bandwidth")
    unit = "GB/s per rank" if session.is_cuda else "GB/s per rank, at toy size"
    text = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    return passed(f"right values; {text} {unit}", gigabytes_per_second=rates)


def uneven_splits(rank: int, size: int) -> tuple[list[int], list[int]]:
    """Rows that a rank sends to each rank, and receives from each.

    The last rank has none at all, unless it is alone.
    """

    def rows(source: int, target: int) -> int:
        last = size - 1
        if size > 1 and last in (source, target):
            return 0
        return 1 + source + 2 * target

    return [rows(rank, r) for r in range(size)], [rows(r, rank) for r in range(size)]


def _values(start: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, exact in every dtype."""
    return ((torch.arange(rows * _WIDTH) + start) % 97).reshape(rows, _WIDTH).to(dtype)


def _all_to_all(
    rank: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    send, receive = uneven_splits(rank, size)
    pairs = [_values(10 * rank + target, n, dtype) for target, n in enumerate(send)]
    wanted = [_values(10 * source + rank, n, dtype) for source, n in enumerate(receive)]
    found = torch.empty(sum(receive), _WIDTH, dtype=dtype, device=device)
    dist.all_to_all_single(found, torch.cat(pairs).to(device), receive, send)
    return found, torch.cat(wanted)


def _all_gather(
    rank: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    found = torch.empty(size * 3, _WIDTH, dtype=dtype, device=device)
    dist.all_gather_into_tensor(found, _values(rank, 3, dtype).to(device))
    return found, torch.cat([_values(r, 3, dtype) for r in range(size)])


def _reduce_scatter(
    rank: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    found = torch.empty(3, _WIDTH, dtype=dtype, device=device)
    dist.reduce_scatter_tensor(found, _parity(rank, 3 * size, dtype).to(device))
    total = sum(_parity(r, 3 * size, torch.int64) for r in range(size))
    assert isinstance(total, Tensor)
    return found, total[3 * rank : 3 * rank + 3].to(dtype)


def _all_reduce(
    rank: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    found = _parity(rank, 3, dtype).to(device)
    dist.all_reduce(found)
    total = sum(_parity(r, 3, torch.int64) for r in range(size))
    assert isinstance(total, Tensor)
    return found, total.to(dtype)


def _parity(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    """0 or 1, so that sums over up to 256 ranks are exact in bf16."""
    return _values(rank, rows, torch.int64).remainder(2).to(dtype)


VALUES: Final[dict[str, Callable[[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]]]] = {
    "all-to-all": _all_to_all,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-reduce": _all_reduce,
}


def _bandwidth(session: Session) -> dict[str, float]:
    """Bytes that a rank must at least send, divided by the median time, in GB/s.

    NCCL's "bus bandwidth": for n ranks the factor is (n - 1) / n of the larger buffer, twice that
    for an all-reduce.  Empty for a single rank, which sends nothing.
    """
    size, device = session.groups.size, session.groups.device.torch_device
    if size == 1:
        return {}
    numbers = (64 if session.is_cuda else 1) * 2**20 // 2 // size * size
    whole = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    other, part = torch.empty_like(whole), whole[: numbers // size].clone()
    runs = {
        "all-to-all": lambda: dist.all_to_all_single(other, whole),
        "all-gather": lambda: dist.all_gather_into_tensor(other, part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all-reduce": lambda: dist.all_reduce(other),
    }
    rounds = 3 if session.quick or not session.is_cuda else 10
    timings = slower_rank(interleave(runs, rounds=rounds, device=device), device)
    sent = 2 * numbers * (size - 1) / size
    factors = {"all-reduce": 2}
    return {
        name: round(factors.get(name, 1) * sent / timings.median(name) / 1e9, 2) for name in runs
    }
