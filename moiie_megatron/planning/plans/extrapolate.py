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

_VISION_LAYERS = (2, 3)  # that are run


@dataclass(frozen=True)
class _Depth:
    """Decoder layers of each stage in groups, and layers of the vision tower."""

    groups: int
    vision: int


@dataclass(frozen=True)
class _Shallow:
    """How to plan a deep run with shallow ones.

    Attributes:
        config: The deep run.
        layers_per_group: Decoder layers after which their kinds repeat.
        groups: How many groups every stage has.
    """

    config: RunConfig
    layers_per_group: int
    groups: int

    def at(self, depth: _Depth) -> RunConfig:
        stages = self.config.parallel.stages
        language = self.config.language.model_copy(
            update={"num_layers": self.layers_per_group * depth.groups * stages}
        )
        vision = self.config.vision
        after_features = vision.num_layers - vision.num_feature_layers
        vision = vision.model_copy(update={"num_layers": depth.vision + after_features})
        return self.config.model_copy(update={"language": language, "vision": vision})


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
    outcomes = simulate(asked)
    results: list[Outcome] = []
    for start, count, combine in made:
        own = outcomes[start : start + count]
        error = next((o for o in own if isinstance(o, UserError)), None)
        traces = [o for o in own if not isinstance(o, UserError)]
        results.append(combine(traces) if error is None else error)
    return results


def shallow_of(config: RunConfig) -> _Shallow | None:
    """How to make a run shallow; None where its layers are not alike, or already few."""
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
    groups = layers // (group * parallel.stages)
    return _Shallow(config, group, groups) if groups > 2 else None


def _whole(job: Job) -> tuple[list[Job], Callable[[Sequence[RankTrace]], RankTrace]]:
    return [job], lambda traces: traces[0]


def _plan(job: Job) -> tuple[list[Job], Callable[[Sequence[RankTrace]], RankTrace]]:
    """The jobs to run for one, and what makes its trace of theirs."""
    shallow = shallow_of(job.config)
    if shallow is None:
        return _whole(job)
    vision = job.config.vision.num_feature_layers
    is_first = job.rank < job.world // job.config.parallel.pipeline
    base_vision = _VISION_LAYERS[0] if vision > _VISION_LAYERS[1] else vision
    depths = [_Depth(1, base_vision), _Depth(2, base_vision)]
    weights = [float(shallow.groups - 1)]
    if is_first and base_vision < vision:
        depths.append(_Depth(1, _VISION_LAYERS[1]))
        weights.append(float(vision - base_vision))
    jobs = [replace(job, config=shallow.at(depth)) for depth in depths]
    groups, per_group = shallow.groups, shallow.layers_per_group

    def combine(traces: Sequence[RankTrace]) -> RankTrace:
        base, *others = traces
        trace = _linear(base, others, weights)
        return replace(trace, expert_rows=_deeper_rows(base, job.config, groups * per_group))

    return jobs, combine


def _deeper_rows(base: RankTrace, config: RunConfig, layers: int) -> dict[int, tuple[int, ...]]:
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
