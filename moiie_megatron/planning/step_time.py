"""How long a step takes, as a range: from what ranks do in it to seconds, tokens/s and MFU.

The step of a pipeline of p ranks with v virtual stages each, m micro-batches and the times t_s of
one micro-batch on every rank takes

    m * max(t) + (sum(t) - max(t)) / v

which for equal ranks is Megatron's bubble of (p - 1) / (v * m), and once per step the update of the
weights and what data parallelism sends.  Both ends of the range are computed in this way, with the
``Efficiency`` of each.

Where ranks share the cores of a machine, a step takes at least the work of all ranks divided by
the number of cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.flops import Work, model_flops
from moiie_megatron.planning.hardware import Efficiency, Hardware
from moiie_megatron.planning.timing.assumptions import time_assumptions
from moiie_megatron.planning.timing.links import transfer_seconds
from moiie_megatron.planning.timing.overlap import Overlap, overlap_of
from moiie_megatron.planning.trace import Compute, RankTrace, Transfer
from moiie_megatron.planning.workload import Workload

BUBBLE: Final = "pipeline bubble"
LAUNCHES: Final = "kernel launches"
GRADIENTS: Final = "gradient reduction"
WEIGHTS: Final = "weight gather"
CORES: Final = "waiting for cores"
_DATA_PARALLEL: Final = ("dp", "expt_dp", "dp_cp")


@dataclass(frozen=True)
class Estimate:
    """A number between two ends."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @classmethod
    def of(cls, first: float, second: float) -> Estimate:
        """From two ends in any order."""
        return cls(min(first, second), max(first, second))


@dataclass(frozen=True)
class StepTime:
    """A step, and what it consists of.

    Attributes:
        seconds: Of the step.
        terms: Seconds by term; they add up to the step.  Computation by part (of the slowest
            pipeline stage), communication by process group (``tp communication``), and the terms
            that are named in this module.
        recompute: Seconds of the computation that are recomputation.
        bubble_fraction: Part of the step in which a pipeline rank waits for others.
        tokens_per_second: Tokens without padding, of all ranks together.
        tflops_per_rank: Model TFLOP/s (``planning/flops.py``).
        mfu: The same over the peak.
        assumptions: What the range rests on, one sentence each.
    """

    seconds: Estimate
    terms: Mapping[str, Estimate]
    recompute: Estimate
    bubble_fraction: Estimate
    tokens_per_second: Estimate
    tflops_per_rank: Estimate
    mfu: Estimate
    assumptions: tuple[str, ...]

    @property
    def bound(self) -> str:
        """The largest term."""
        return max(self.terms, key=lambda name: self.terms[name].middle)


def step_time(
    config: RunConfig, stages: Sequence[RankTrace], workload: Workload, hardware: Hardware
) -> StepTime:
    """The time of a step.

    Args:
        config: The run.
        stages: What a rank of every pipeline rank does, in order; stages that are alike may be
            given the same trace.
        workload: The micro-batches of a data-parallel rank; a trace may be of fewer of them.
        hardware: Where it runs.
    """
    overlap = overlap_of(config, hardware)
    fast, slow = (
        _ends(config, stages, len(workload.micro_batches), _Case(hardware, end, overlap))
        for end in (hardware.fast, hardware.slow)
    )
    names = dict.fromkeys([*fast.terms, *slow.terms])
    seconds = Estimate.of(fast.seconds, slow.seconds)
    world = stages[0].world
    replicas = world // (config.parallel.tensor * config.parallel.pipeline)
    work = work_of(workload)
    flops = model_flops(config).of(work) * replicas / world
    rates = Estimate(flops / seconds.high, flops / seconds.low)
    # Where ranks share cores, each has its part of the machine.
    peak = hardware.flops if hardware.cores is None else hardware.flops * hardware.cores / world
    return StepTime(
        seconds=seconds,
        terms={
            name: Estimate.of(fast.terms.get(name, 0.0), slow.terms.get(name, 0.0))
            for name in names
        },
        recompute=Estimate.of(fast.recompute, slow.recompute),
        bubble_fraction=Estimate.of(*(e.terms[BUBBLE] / e.seconds for e in (fast, slow))),
        tokens_per_second=Estimate(
            work.tokens * replicas / seconds.high, work.tokens * replicas / seconds.low
        ),
        tflops_per_rank=Estimate(rates.low / 1e12, rates.high / 1e12),
        mfu=Estimate(rates.low / peak, rates.high / peak),
        assumptions=time_assumptions(config, stages, hardware, overlap),
    )


def work_of(workload: Workload) -> Work:
    """What a data-parallel rank has to process in a step."""
    samples = [sample for shape in workload.micro_batches for sample in shape.samples]
    return Work(
        tokens=sum(sample.tokens for sample in samples),
        labels=sum(sample.labels for sample in samples),
        images=sum(sample.images for sample in samples),
        squared_lengths=sum(sample.tokens**2 for sample in samples),
    )


@dataclass(frozen=True)
class _Case:
    """One end of the range."""

    hardware: Hardware
    end: Efficiency
    overlap: Overlap

    @property
    def has_own_device(self) -> bool:
        return self.hardware.cores is None

    def efficiency_of(self, part: str) -> float:
        by_part = {
            "attention": self.end.attention,
            "experts": self.end.experts,
            "vision": self.end.vision,
        }
        return by_part.get(part, self.end.products)

    def compute_seconds(self, compute: Compute) -> float:
        """Products at their rate or that of the memory, whichever is slower; then the rest."""
        bandwidth = self.hardware.memory_bandwidth * self.end.memory
        flops = self.hardware.flops * self.efficiency_of(compute.part)
        products = max(compute.flops / flops, compute.matmul_bytes / bandwidth)
        rest = (compute.bytes - compute.matmul_bytes) * self.end.unfused / bandwidth
        # A host that computes itself launches nothing ahead.
        launches = 0.0 if self.has_own_device else self.launch_seconds(compute)
        return products + rest + launches

    def launch_seconds(self, compute: Compute) -> float:
        return compute.kernels * self.end.unfused * self.end.launch


@dataclass(frozen=True)
class _RankTime:
    """Seconds of one rank: of a micro-batch by term, and once per step by term."""

    micro_batch: Mapping[str, float]
    once: Mapping[str, float]
    recompute: float

    @property
    def of_micro_batch(self) -> float:
        return sum(self.micro_batch.values())

    @property
    def of_once(self) -> float:
        return sum(self.once.values())


@dataclass(frozen=True)
class _End:
    """A step at one end of the range."""

    seconds: float
    terms: Mapping[str, float]
    recompute: float


def _ends(config: RunConfig, stages: Sequence[RankTrace], count: int, case: _Case) -> _End:
    ranks = [_rank_time(trace, len(stages), count, case) for trace in stages]
    slowest = max(ranks, key=lambda rank: rank.of_micro_batch)
    last = max(ranks, key=lambda rank: rank.of_once)
    others = sum(rank.of_micro_batch for rank in ranks) - slowest.of_micro_batch
    terms: dict[str, float] = defaultdict(float)
    for name, seconds in slowest.micro_batch.items():
        terms[name] += seconds * count
    for name, seconds in last.once.items():
        terms[name] += seconds
    terms[BUBBLE] += others / config.parallel.virtual_pipeline
    if case.hardware.cores is not None:
        busy = sum(rank.of_micro_batch * count + rank.of_once for rank in ranks)
        shared = busy * (stages[0].world / len(stages)) / case.hardware.cores
        terms[CORES] = max(0.0, shared - sum(terms.values()))
    return _End(sum(terms.values()), terms, slowest.recompute * count)


def _rank_time(trace: RankTrace, stages: int, count: int, case: _Case) -> _RankTime:
    """One rank; a step has ``count`` micro-batches."""
    traced = max(trace.micro_batches, 1)
    micro_batch: dict[str, float] = defaultdict(float)
    once: dict[str, float] = defaultdict(float)
    passes: dict[str, float] = defaultdict(float)  # what a micro-batch computes, and launches
    launches: dict[str, float] = defaultdict(float)
    recompute = 0.0
    for compute in trace.compute:
        seconds = case.compute_seconds(compute)
        if compute.when == "update":
            once[compute.part] += seconds
            continue
        micro_batch[compute.part] += seconds / traced
        # Layers are recomputed within the backward pass.
        direction = "forward" if compute.when == "forward" else "backward"
        passes[direction] += seconds / traced
        launches[direction] += case.launch_seconds(compute) / traced
        recompute += seconds / traced if compute.when == "recompute" else 0.0
    if case.has_own_device:
        late = sum(max(0.0, launches[name] - passes[name]) for name in passes)
        micro_batch[LAUNCHES] += late
    behind = {GRADIENTS: passes["backward"], WEIGHTS: passes["forward"]}
    for transfer in trace.transfers:
        seconds = transfer_seconds(transfer, trace, stages, case.hardware, case.end)
        name = _term(transfer)
        if not transfer.per_micro_batch:
            once[name] += seconds
        elif not _hides_send(transfer, case):
            micro_batch[name] += seconds / traced
    for name, hidden in behind.items():
        if name in once and _hides(name, case):
            once[name] = max(0.0, once[name] - hidden)
    return _RankTime(dict(micro_batch), dict(once), recompute)


def _term(transfer: Transfer) -> str:
    """What the time of a transfer is counted as."""
    if transfer.group in _DATA_PARALLEL and not transfer.per_micro_batch:
        is_gather = transfer.operation.startswith("all_gather")
        return WEIGHTS if is_gather else GRADIENTS
    return f"{transfer.group} communication"


def _hides(name: str, case: _Case) -> bool:
    overlaps = case.overlap.gradients if name == GRADIENTS else case.overlap.weights
    return overlaps and case.end.hides_data_parallel


def _hides_send(transfer: Transfer, case: _Case) -> bool:
    is_send = transfer.operation in ("send", "recv")
    return is_send and case.overlap.sends and case.end.hides_pipeline
