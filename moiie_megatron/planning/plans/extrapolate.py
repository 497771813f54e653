"""A rank of a deep model from ranks of shallow ones: all that it does is linear in its layers.

Two simulations with few decoder layers give what a group of layers adds, a third one with more
layers of the vision tower what such a layer adds.  FLOPs, bytes, kernels and transfers are
exact in this way; the peak of the activations is, as long as the deep model has it at the same
place in the step as the shallow ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.plans.jobs import Job, Outcome, Simulate
from moiie_megatron.planning.trace import (
    PARTS,
    Compute,
    MemorySample,
    MemoryTrace,
    RankTrace,
    Transfer,
)
from moiie_megatron.utils.errors import UserError

_GROUPS = (1, 2)
_VISION_LAYERS = (2, 3)  # that are run


@dataclass(frozen=True)
class _Depth:
    """Decoder layers of each stage in groups, and layers of the vision tower."""

    groups: int
    vision: int


@dataclass(frozen=True)
class _Shallow:
    """How to plan a deep run with shallow ones, which have no virtual stages.

    Attributes:
        config: The deep run.
        layers_per_group: Decoder layers after which their kinds repeat.
        groups: How many groups every pipeline rank has.
    """

    config: RunConfig
    layers_per_group: int
    groups: int

    def at(self, depth: _Depth) -> RunConfig:
        parallel = self.config.parallel.model_copy(update={"virtual_pipeline": 1})
        language = self.config.language.model_copy(
            update={"num_layers": self.layers_per_group * depth.groups * parallel.pipeline}
        )
        vision = self.config.vision
        after_features = vision.num_layers - vision.num_feature_layers
        vision = vision.model_copy(update={"num_layers": depth.vision + after_features})
        return self.config.model_copy(
            update={"language": language, "vision": vision, "parallel": parallel}
        )


def simulate_shallow(jobs: Sequence[Job], simulate: Simulate) -> list[Outcome]:
    """The traces of ranks, extrapolated from shallow models where that is possible.

    Args:
        jobs: The ranks.
        simulate: Runs the shallow ones, and those that cannot be extrapolated.
    """
    return simulate_some_shallow([], jobs, simulate)


def simulate_some_shallow(
    deep: Sequence[Job], shallow: Sequence[Job], simulate: Simulate
) -> list[Outcome]:
    """The traces of ranks, side by side.

    Args:
        deep: Simulated as they are.
        shallow: Extrapolated from shallow models where that is possible.
        simulate: Runs them.
    """
    asked: list[Job] = []
    made: list[tuple[int, int, Callable[[Sequence[RankTrace]], RankTrace]]] = []
    for number, job in enumerate([*deep, *shallow]):
        smaller, combine = _whole(job) if number < len(deep) else _plan(job)
        made.append((len(asked), len(smaller), combine))
        asked += smaller
    outcomes = _simulate_once(asked, simulate)
    results: list[Outcome] = []
    for start, count, combine in made:
        own = outcomes[start : start + count]
        error = next((o for o in own if isinstance(o, UserError)), None)
        traces = [o for o in own if not isinstance(o, UserError)]
        results.append(combine(traces) if error is None else error)
    return results


def _simulate_once(jobs: Sequence[Job], simulate: Simulate) -> list[Outcome]:
    """Run equal jobs once: layouts that differ in virtual stages alone have the same ones."""
    unique: list[Job] = []
    numbers = []
    for job in jobs:
        if job not in unique:
            unique.append(job)
        numbers.append(unique.index(job))
    outcomes = simulate(unique)
    return [outcomes[number] for number in numbers]


def shallow_of(config: RunConfig) -> _Shallow | None:
    """How to make a run shallow; None where stages are not alike, or its layers few already."""
    parallel, layers = config.parallel, config.language.num_layers
    moe = config.moe_layers
    if moe and config.moe.layers == "interleaved":
        group = 2
    elif not moe or config.moe.layers == "all":
        group = 1
    else:
        return None
    if parallel.pipeline_layers is not None or layers % (group * parallel.stages):
        return None
    fields = config.megatron
    # A fixed number of recomputed layers is another fraction of few layers.
    if fields.get("recompute_granularity") == "full" and fields.get("recompute_num_layers") != 1:
        return None
    if fields.get("recompute_method") == "block":
        return None
    if any(name.startswith("num_layers_in_") for name in fields):
        return None
    groups = layers // (group * parallel.pipeline)
    vision = config.vision.num_feature_layers
    is_shallow = groups <= _GROUPS[1] and vision <= _VISION_LAYERS[1]
    is_plain = is_shallow and parallel.virtual_pipeline == 1
    return None if is_plain else _Shallow(config, group, groups)


def _whole(job: Job) -> tuple[list[Job], Callable[[Sequence[RankTrace]], RankTrace]]:
    return [job], lambda traces: traces[0]


def _plan(job: Job) -> tuple[list[Job], Callable[[Sequence[RankTrace]], RankTrace]]:
    """The jobs to run for one, and what makes its trace of theirs."""
    shallow = shallow_of(job.config)
    if shallow is None:
        return _whole(job)
    vision = job.config.vision.num_feature_layers
    is_first = job.rank < job.world // job.config.parallel.pipeline
    few, more = _VISION_LAYERS if vision > _VISION_LAYERS[1] else (vision, vision)
    one, two = _GROUPS if shallow.groups > _GROUPS[1] else (shallow.groups, shallow.groups)
    depths = [_Depth(one, few)]
    weights: list[float] = []
    if two > one:
        depths.append(_Depth(two, few))
        weights.append(float(shallow.groups - one))
    if is_first and more > few:
        depths.append(_Depth(one, more))
        weights.append(float(vision - few))
    jobs = [replace(job, config=shallow.at(depth)) for depth in depths]

    def combine(traces: Sequence[RankTrace]) -> RankTrace:
        base, *others = traces
        trace = _linear(base, others, weights)
        return replace(
            trace,
            transfers=tuple(_through_stages(one, job.config) for one in trace.transfers),
            expert_rows=_deeper_rows(base, job.config),
        )

    return jobs, combine


def _through_stages(transfer: Transfer, config: RunConfig) -> Transfer:
    """With virtual stages a micro-batch passes every pipeline rank as many times."""
    if transfer.operation not in ("send", "recv"):
        return transfer
    times = config.parallel.virtual_pipeline
    return replace(transfer, calls=transfer.calls * times, bytes_sent=transfer.bytes_sent * times)


def _deeper_rows(base: RankTrace, config: RunConfig) -> dict[int, tuple[int, ...]]:
    """Rows of the experts of every layer: like those of the first layers."""
    if not base.expert_rows:
        return {}
    known = list(base.expert_rows.values())
    local = len(config.moe_layers) // config.parallel.pipeline
    return {number: known[number % len(known)] for number in range(local)}


def _linear(base: RankTrace, others: Sequence[RankTrace], weights: Sequence[float]) -> RankTrace:
    """``base`` and, by its weight, what each of the others has more than it."""
    everything = [base, *others]
    factors = [1 - sum(weights), *weights]

    def combined(values: Iterable[float]) -> int:
        return max(0, round(sum(f * v for f, v in zip(factors, values, strict=True))))

    def by_key(items: Callable[[RankTrace], Iterable[Any]], key: Callable[[Any], Any]) -> Any:
        tables = [{key(item): item for item in items(trace)} for trace in everything]
        return [(name, [t.get(name) for t in tables]) for name in tables[0]]

    def of(items: Sequence[Any], name: str) -> int:
        return combined(getattr(item, name) if item is not None else 0 for item in items)

    compute = tuple(
        Compute(*key, *(of(items, name) for name in ("flops", "bytes", "matmul_bytes", "kernels")))
        for key, items in by_key(lambda t: t.compute, lambda c: (c.part, c.when))
    )
    transfers = tuple(
        Transfer(*key, *(of(items, name) for name in ("calls", "bytes_sent")))
        for key, items in by_key(
            lambda t: t.transfers,
            lambda x: (x.operation, x.group, x.members, x.when, x.per_micro_batch),
        )
    )
    memory = [trace.memory for trace in everything]
    peak = MemorySample(
        base.memory.peak.when,
        base.memory.peak.micro_batch,
        {
            part: held
            for part in PARTS
            if (held := combined(m.peak.activations.get(part, 0) for m in memory))
        },
    )
    return replace(
        base,
        compute=compute,
        transfers=transfers,
        memory=MemoryTrace(
            weights=combined(m.weights for m in memory),
            gradients=combined(m.gradients for m in memory),
            optimizer=combined(m.optimizer for m in memory),
            peak=peak,
            timeline=(peak,),
        ),
    )
