"""One step of every layout, real and simulated, compared number by number.

    torchrun --nproc-per-node 2 benchmarks/planner_exact.py --out FOLDER [--cases EP=2;DP=2]

Part of ``benchmarks/planner.py``.  Every process runs its rank for real over Gloo and then
simulates the same rank, with the same forced routing, and writes ``FOLDER/CASE.RANK.json``.  A
second real step runs under torch's profiler instead of the trackers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from planner_cases import CASES, MICRO_BATCHES, workload
from torch.distributed.distributed_c10d import Work
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.process_lifetime import kill_children_on_exit
from moiie_megatron.mcore.run import run_sequentially
from moiie_megatron.planning.routing import balanced
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.planning.workload import Workload
from moiie_megatron.simulation.batches import make_batch
from moiie_megatron.simulation.flops import FORMULAS
from moiie_megatron.simulation.rank import simulate_rank
from moiie_megatron.simulation.routed_layers import routed_by
from moiie_megatron.simulation.routing import SimulatedRouting
from moiie_megatron.simulation.states import make_moments
from moiie_megatron.simulation.trace_step import trace_step
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.utils.replaced import replaced
from moiie_megatron.vlm.build import build_chunks

_RELEASE_SECONDS: Final = 0.003
# Kernels whose FLOPs torch's profiler knows.
_PROFILER_KNOWS: Final = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_CONVOLUTION: Final = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


@dataclass(frozen=True)
class Profiled:
    """What torch says of a real step without the trackers.

    Attributes:
        flops: Of matrix products, by torch's profiler.
        other_flops: Of what the profiler has no formula for, by ``FlopCounterMode``: convolution,
            with torch's formula, and fused attention, with that of the simulation.
        peak: Bytes that torch's allocator had given out at once, beyond those before the step.
    """

    flops: int
    other_flops: int
    peak: int


def real_step(
    config: RunConfig, context: ParallelContext, work: Workload, *, profiled: bool
) -> tuple[RankTrace, Profiled | None]:
    """Build this rank and let it take one step, or two."""
    state = prepare_training(config, context, build_chunks(config, context), steps=10)
    make_moments(state)
    state.model.train()
    batches = [make_batch(config, shape) for shape in work.micro_batches]
    routing = SimulatedRouting(balanced(config.moe.layout), config.placement)
    with tensors_released_by_gloo():
        trace = trace_step(config, context, state, batches, routing)
        if not profiled:
            return trace, None
        dist.barrier()
        with (
            routed_by(routing, context.groups),
            profile(activities=[ProfilerActivity.CPU], with_flops=True, profile_memory=True) as p,
        ):
            train_step(config, context, state, batches)
        dist.barrier()
        with (
            routed_by(routing, context.groups),
            FlopCounterMode(display=False, custom_mapping=_formulas()) as counter,
        ):
            train_step(config, context, state, batches)
    others = counter.get_flop_counts()["Global"]
    return trace, Profiled(
        flops=sum(event.flops for event in p.key_averages() if event.key in _PROFILER_KNOWS),
        other_flops=sum(others.get(kernel, 0) for kernel in (*FORMULAS, *_CONVOLUTION)),
        peak=_peak(p),
    )


@contextmanager
def tensors_released_by_gloo() -> Iterator[None]:
    """Collectives have let go of their tensors when a wait for them returns.

    Gloo's threads hold them for a moment longer, which at random adds to the peak: no property of
    the layout, and none of NCCL.
    """
    wait = Work.wait

    def wait_longer(work: Work, *args: Any) -> Any:
        result = wait(work, *args)
        time.sleep(_RELEASE_SECONDS)
        return result

    with replaced(Work, wait=wait_longer):
        yield


def compare(simulated: RankTrace, real: RankTrace, profiled: Profiled | None) -> dict[str, Any]:
    """What a rank did, and how far its simulation is off."""
    states = {
        name: (getattr(simulated.memory, name), getattr(real.memory, name))
        for name in ("weights", "gradients", "optimizer")
    }
    wires = [_wire(trace) for trace in (simulated, real)]
    return {
        "states": states,
        "peak": (simulated.memory.peak.total, real.memory.peak.total),
        "expert_rows": [
            {str(layer): rows for layer, rows in trace.expert_rows.items()}
            for trace in (simulated, real)
        ],
        "wire": {
            key: tuple(wire.get(key, (0, 0)) for wire in wires)
            for key in dict.fromkeys((*wires[0], *wires[1]))
        },
        "flops": tuple(sum(c.flops for c in trace.compute) for trace in (simulated, real)),
        "kernels": tuple(sum(c.kernels for c in trace.compute) for trace in (simulated, real)),
        "profiled": None if profiled is None else asdict(profiled),
    }


def _wire(trace: RankTrace) -> dict[str, tuple[int, int]]:
    """Calls and bytes by group, collective and pass."""
    found: dict[str, tuple[int, int]] = {}
    for transfer in trace.transfers:
        key = f"{transfer.group} {transfer.operation} {transfer.when} {list(transfer.members)}"
        assert key not in found
        found[key] = transfer.calls, transfer.bytes_sent
    return found


def _formulas() -> dict[Any, Any]:
    """``FORMULAS`` for FlopCounterMode, which gives plain formulas shapes instead of tensors."""

    def raw(formula: Any) -> Any:
        def count(*args: Any, out_val: Any, **kwargs: Any) -> int:
            return int(formula(*args, **kwargs))

        count._get_raw = True  # type: ignore[attr-defined]
        return count

    return {kernel: raw(formula) for kernel, formula in FORMULAS.items()}


def _peak(profiler: Any) -> int:
    """Most bytes at once, of the allocations and releases that a profiler has seen."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--cases", help="names, with a semicolon between; default: all that fit")
    parser.add_argument("--micro-batches", type=int, default=MICRO_BATCHES)
    parser.add_argument("--profile", action="store_true", help="also steps under the profiler")
    options = parser.parse_args()
    kill_children_on_exit()  # this process ends with torchrun, too
    torch.set_num_threads(1)
    launch = dist_env_from(os.environ)
    count = options.micro_batches
    names = options.cases.split(";") if options.cases else None
    cases = [
        case
        for case in CASES
        if case.world == launch.world_size and (names is None or case.name in names)
    ]
    configs = [case.config() for case in cases]
    measured: list[tuple[RankTrace, Profiled | None]] = []
    run_sequentially(
        configs,
        launch,
        lambda config, context: measured.append(
            real_step(config, context, workload(config, count), profiled=options.profile)
        ),
    )
    for case, config, (real, profiled) in zip(cases, configs, measured, strict=True):
        simulated = simulate_rank(
            config,
            world=case.world,
            rank=launch.rank,
            workload=workload(config, count),
            routing=balanced(config.moe.layout),
        )
        result = compare(simulated, real, profiled)
        (options.out / f"{case.name}.{launch.rank}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
