"""Times of steps of many layouts with the same samples, and what the rates of this machine predict.

    torchrun --nproc-per-node 2 benchmarks/planner_ranking.py --out FOLDER

Part of ``benchmarks/planner.py``.  All layouts train on the same 32 samples with two processes, in
turn and several times over, without trackers.  The machine's rates are measured in between, by
kernels and collectives alone; no time of a layout goes into its prediction or that of another one.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from planner_cases import EXAMPLES, FULL, PACKING, parallel

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.process_lifetime import kill_children_on_exit
from moiie_megatron.mcore.run import run_sequentially
from moiie_megatron.planning.hardware import CpuRates, Hardware, cpu_machine
from moiie_megatron.planning.routing import balanced
from moiie_megatron.planning.step_time import step_time
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload
from moiie_megatron.simulation.batches import make_batch
from moiie_megatron.simulation.rank import simulate_rank
from moiie_megatron.simulation.routed_layers import routed_by
from moiie_megatron.simulation.routing import SimulatedRouting
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks

WORLD: Final = 2
SAMPLES: Final = 32
STEPS: Final = 3  # timed, of every layout in every round
ALLTOALL: Final = ("moe.dispatcher=alltoall",)
FIXED: Final = ("data.padding=sequence_length",)


def rows(number: int) -> tuple[str, ...]:
    """Samples of a micro-batch."""
    return (f"train.micro_batch_size={number}",)


LAYOUTS: Final[dict[str, tuple[str, ...]]] = {
    "DP=2": (*parallel(), *rows(4)),
    "DP=2, micro-batch 1": (*parallel(), *rows(1)),
    "DP=2, padded to 256": (*parallel(), *rows(4), *FIXED),
    "DP=2, packing": (*parallel(), *rows(4), PACKING),
    "DP=2, full": (*parallel(), *rows(4), *FULL),
    "DP=2, micro-batch 1, full": (*parallel(), *rows(1), *FULL),
    "DP=2, padded to 256, full": (*parallel(), *rows(4), *FIXED, *FULL),
    "DP=2, dense": (
        *rows(4),
        "parallel.expert=1",
        "stage.moe=false",
        "stage.learning_rates.moe=null",
    ),
    "DP=2, vision frozen": (*parallel(), *rows(4), "stage.learning_rates.vision=null"),
    "EP=2": (*parallel(expert=2), *rows(4)),
    "EP=2, alltoall, micro-batch 2": (*parallel(expert=2), *rows(2), *ALLTOALL),
    "TP=2": (*parallel(tensor=2), *rows(4)),
    "TP=2, micro-batch 2, full": (*parallel(tensor=2), *rows(2), *FULL),
    "PP=2": (*parallel(pipeline=2), *rows(4)),
    "PP=2, micro-batch 1": (*parallel(pipeline=2), *rows(1)),
}
# Nothing but the work of the host beside kernels: widths and a sample that are as small as can be.
SMALLEST: Final = (
    *parallel(),
    *rows(1),
    "language.hidden_size=16",
    "language.ffn_hidden_size=16",
    "language.num_attention_heads=2",
    "vision.hidden_size=16",
    "vision.ffn_hidden_size=16",
    "vision.num_attention_heads=2",
)


@dataclass
class Measured:
    """What one rank measured.

    Attributes:
        seconds: Of steps by layout, the slower rank's.
        smallest: Of steps of ``SMALLEST``.
        flops: FLOP/s of matrix products, by round.
        bandwidth: Bytes per second of other kernels on one core, by round.
        latency: Seconds of a collective without content, between products, by round.
        sending: Bytes per second that a rank sends, by round.
        traces: Simulated, by layout; of this rank, where it differs from the other one, and else
            by one of the two.
        smallest_trace: Of ``SMALLEST``.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    smallest: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    sending: list[float] = field(default_factory=list)
    traces: dict[str, RankTrace] = field(default_factory=dict)
    smallest_trace: RankTrace | None = None


def configuration(words: Sequence[str]) -> RunConfig:
    """The run of a layout."""
    size = f"train.global_batch_size={SAMPLES}"
    return load_config(EXAMPLES / "digits-stage2.yaml", [size, *words])


def samples_of_rank(config: RunConfig) -> list[SampleShape]:
    """The samples of a data-parallel rank: the same for each of them, one text in four."""
    parallel = config.active_parallel
    count = SAMPLES * parallel.tensor * parallel.pipeline // WORLD
    lengths = [64 + 12 * (7 * number % 16) for number in range(SAMPLES // 2)]  # 64..244
    shapes = [
        SampleShape(length, int(number % 4 != 0), length // 4)
        for number, length in enumerate(lengths)
    ]
    return (shapes * 2)[:count]


def workload_of(config: RunConfig) -> Workload:
    """The micro-batches that a data-parallel rank makes of its samples."""
    samples = samples_of_rank(config)
    rows_, longest = config.micro_batch_shape
    shapes = []
    if config.data.packing:
        row: list[SampleShape] = []
        for sample in samples:
            if sum(s.tokens for s in row) + sample.tokens > longest:
                shapes.append(MicroBatchShape((tuple(row),), longest))
                row = []
            row.append(sample)
        shapes.append(MicroBatchShape((tuple(row),), longest))
    else:
        fixed = config.data.padding == "sequence_length"
        for start in range(0, len(samples), rows_):
            part = samples[start : start + rows_]
            length = longest if fixed else max(sample.tokens for sample in part)
            shapes.append(MicroBatchShape(tuple((sample,) for sample in part), length))
    return Workload(tuple(shapes), "32 samples of 64 to 244 tokens")


def smallest_workload() -> Workload:
    shape = MicroBatchShape(((SampleShape(32, 1, 8),),), 32)
    return Workload((shape,) * 4, "samples of 32 tokens")


def step_seconds(config: RunConfig, context: ParallelContext, work: Workload) -> list[float]:
    """Times of some steps after a first one."""
    state = prepare_training(config, context, build_chunks(config, context), steps=1000)
    state.model.train()
    batches = [make_batch(config, shape) for shape in work.micro_batches]
    routing = SimulatedRouting(balanced(config.moe.layout), config.placement)
    with routed_by(routing, context.groups):
        times = timed(lambda: train_step(config, context, state, batches), repeats=STEPS)
    slowest = torch.tensor(times)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    result: list[float] = slowest.tolist()
    return result


def timed(body: Callable[[], object], *, repeats: int) -> list[float]:
    """Seconds of every call after a first one; all ranks start together."""
    times = []
    for number in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        body()
        if number:
            times.append(time.perf_counter() - start)
    return times


def measure_machine(measured: Measured, config: RunConfig) -> None:
    """Rates of kernels of the model's sizes and of collectives, both ranks at once."""
    hidden, ffn = config.language.hidden_size, config.language.ffn_hidden_size
    factors = [
        (torch.randn(tokens, width), torch.randn(width, out))
        for tokens in (160, 640, 1024)
        for width, out in ((hidden, 2 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden))
    ]
    flops = sum(2 * left.numel() * right.shape[1] for left, right in factors)

    def products() -> None:
        for left, right in factors:
            left @ right

    measured.flops.append(flops / statistics.median(timed(products, repeats=10)))
    x, y = torch.randn(2, 640, ffn).unbind(0)
    order = torch.randperm(len(x))
    size = x.nbytes

    def others() -> None:
        x * y
        x + y
        torch.nn.functional.silu(x)
        x.index_select(0, order)
        x.clone()
        x.square()
        torch.cat([x, y])

    sizes = size * (3 + 3 + 2 + 2 + 2 + 2 + 4)
    measured.bandwidth.append(sizes / statistics.median(timed(others, repeats=20)))
    # As in a step: between products, from which the ranks come a little apart.
    little, (left, right) = torch.zeros(1), factors[0]

    def computing(then: Callable[[], object]) -> Callable[[], None]:
        def body() -> None:
            for _ in range(20):
                left @ right
                then()

        return body

    alone = statistics.median(timed(computing(lambda: None), repeats=10))
    both = statistics.median(timed(computing(lambda: dist.all_reduce(little)), repeats=10))
    latency = (both - alone) / 20
    measured.latency.append(latency)
    much, gathered = torch.zeros(1 << 18), torch.zeros(1 << 19)

    def collectives() -> None:
        dist.all_reduce(much)
        dist.all_gather_into_tensor(gathered, much)
        dist.all_to_all_single(gathered[: 1 << 18], much)

    seconds = min(timed(collectives, repeats=10))
    # A ring of two sends the whole twice over two; the whole; half of it.
    measured.sending.append(much.nbytes * 2.5 / seconds)


def machine(ranks: Sequence[Measured]) -> Hardware:
    """This machine, by what its ranks measured: the best of all rounds, means over ranks.

    Other programs on the machine only ever take time away.
    """

    def mean(best: Callable[[list[float]], float], name: str) -> float:
        return statistics.mean(best(getattr(rank, name)) for rank in ranks)

    latency = mean(min, "latency")
    trace = ranks[0].smallest_trace
    assert trace is not None
    calls = sum(transfer.calls for transfer in trace.transfers)
    kernels = sum(compute.kernels for compute in trace.compute)
    kernel = (min(ranks[0].smallest) - calls * latency) / kernels
    rates = CpuRates(
        flops_per_core=mean(max, "flops"),
        memory_bandwidth=mean(max, "bandwidth") * WORLD,
        gloo_bandwidth=mean(max, "sending"),
        kernel_seconds=kernel,
        collective_seconds=latency,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return cpu_machine(WORLD, memory, rates)


def predictions(ranks: Sequence[Measured], hardware: Hardware) -> dict[str, float]:
    """Seconds of a step, by layout."""
    result = {}
    for name, words in LAYOUTS.items():
        config = configuration(words)
        traces = [rank.traces[name] for rank in ranks if name in rank.traces]
        # Of ranks that hold other experts the slower one sets the pace.
        pipelines = [traces] if config.parallel.pipeline > 1 else [[trace] for trace in traces]
        result[name] = max(
            step_time(config, stages, workload_of(config), hardware).seconds.middle
            for stages in pipelines
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    kill_children_on_exit()  # this process ends with torchrun, too
    torch.set_num_threads(1)
    launch = dist_env_from(os.environ)
    measured = Measured()
    smallest = configuration(SMALLEST)
    configs = {name: configuration(words) for name, words in LAYOUTS.items()}
    names = {id(config): name for name, config in configs.items()}

    def body(config: RunConfig, context: ParallelContext) -> None:
        if config is smallest:
            measure_machine(measured, next(iter(configs.values())))
            measured.smallest += step_seconds(config, context, smallest_workload())
        else:
            times = step_seconds(config, context, workload_of(config))
            measured.seconds.setdefault(names[id(config)], []).extend(times)

    in_turn = [smallest, *configs.values()]
    run_sequentially(in_turn * options.rounds, launch, body)

    def simulated(config: RunConfig, work: Workload) -> RankTrace:
        routing = balanced(config.moe.layout)
        return simulate_rank(config, world=WORLD, rank=launch.rank, workload=work, routing=routing)

    file = options.out / f"{launch.rank}.pickle"
    file.write_bytes(pickle.dumps(vars(measured)))  # what cannot be had again
    for number, (name, config) in enumerate(configs.items()):
        differ = max(config.parallel.pipeline, config.parallel.expert) > 1
        if differ or number % WORLD == launch.rank:
            measured.traces[name] = simulated(config, workload_of(config))
    measured.smallest_trace = simulated(smallest, smallest_workload())
    file.write_bytes(pickle.dumps(vars(measured)))


if __name__ == "__main__":
    main()
