"""The sentences that say what an estimated step time rests on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.hardware import Efficiency, Hardware
from moiie_megatron.planning.timing.links import crosses_nodes
from moiie_megatron.planning.timing.overlap import Overlap
from moiie_megatron.planning.trace import RankTrace


def time_assumptions(
    config: RunConfig, stages: Sequence[RankTrace], hardware: Hardware, overlap: Overlap
) -> tuple[str, ...]:
    """One sentence for every assumption, with its two values."""
    if hardware.cores is not None:
        return tuple(_of_shared_cores(hardware))
    return tuple(_of_gpus(config, stages, hardware, overlap))


def _of_gpus(
    config: RunConfig, stages: Sequence[RankTrace], hardware: Hardware, overlap: Overlap
) -> Iterator[str]:
    slow, fast = hardware.slow, hardware.fast
    yield (
        f"Matrix products run at {_range(slow.products, fast.products)} of {hardware.name}'s "
        f"{hardware.flops / 1e12:.0f} TFLOP/s, those of experts at "
        f"{_range(slow.experts, fast.experts)}, attention with its projections at "
        f"{_range(slow.attention, fast.attention)}, the vision encoder at "
        f"{_range(slow.vision, fast.vision)}."
    )
    yield (
        f"Other kernels take the time of their bytes at {_range(slow.memory, fast.memory)} of "
        f"{hardware.memory_bandwidth / 1e12:.2f} TB/s; fused kernels leave "
        f"{_range(fast.unfused, slow.unfused)} of the bytes and kernels that were traced."
    )
    yield (
        f"The host launches a kernel in {fast.launch * 1e6:.0f} to {slow.launch * 1e6:.0f} us; "
        "a pass takes at least as long as its launches."
    )
    yield (
        f"Links reach {_range(slow.links, fast.links)} of {hardware.node_link / 1e9:.0f} GB/s in a "
        f"node and {hardware.network_link / 1e9:.0f} GB/s per GPU between nodes; a collective "
        f"takes {fast.latency * 1e6:.0f} to {slow.latency * 1e6:.0f} us beside its bytes."
    )
    groups = _groups(stages, hardware)
    if groups:
        yield f"Process groups: {', '.join(groups)}."
    yield "Communication of tensor and expert parallelism waits for nothing and hides nowhere."
    yield _hidden("Gradient reduction", overlap.gradients, "the last backward pass", fast)
    yield _hidden("The gather of weights", overlap.weights, "the first forward pass", fast)
    yield from _pipeline(config, overlap)
    yield (
        "Every data-parallel rank has micro-batches like the traced ones, and data loading, "
        "evaluation and checkpoints take no time of a step."
    )


def _of_shared_cores(hardware: Hardware) -> Iterator[str]:
    yield (
        f"All ranks share {hardware.cores} cores, one thread each: a step takes at least the work "
        "of all ranks divided by the cores."
    )
    yield (
        f"A core computes {hardware.flops / 1e9:.1f} GFLOP/s of matrix products and moves "
        f"{hardware.memory_bandwidth / 1e9:.1f} GB/s; a kernel takes "
        f"{hardware.fast.launch * 1e6:.1f} us and a collective "
        f"{hardware.fast.latency * 1e6:.0f} us beside that."
    )
    yield f"A rank sends {hardware.node_link / 1e9:.2f} GB/s, and no communication is hidden."


def _pipeline(config: RunConfig, overlap: Overlap) -> Iterator[str]:
    if config.parallel.pipeline == 1:
        return
    bubble = "(p - 1) / (v m)"
    yield (
        f"Pipeline ranks wait for {bubble} of the computation, with p = "
        f"{config.parallel.pipeline} ranks, v = {config.parallel.virtual_pipeline} virtual stages "
        "and m micro-batches, and for the slowest of them."
    )
    yield (
        "Sends between stages are hidden at best and not at all at worst."
        if overlap.sends
        else "Sends between stages are not hidden."
    )


def _hidden(what: str, overlaps: bool, behind: str, fast: Efficiency) -> str:
    if overlaps and fast.hides_data_parallel:
        return f"{what} is hidden behind {behind} at best and not at all at worst."
    return f"{what} is not hidden."


def _groups(stages: Sequence[RankTrace], hardware: Hardware) -> list[str]:
    found: dict[str, bool] = {}
    for trace in stages:
        for transfer in trace.transfers:
            crosses = crosses_nodes(transfer, trace, len(stages), hardware)
            found[transfer.group] = found.get(transfer.group, False) or crosses
    where = {False: "inside a node", True: "over the network"}
    return [f"{group} {where[crosses]}" for group, crosses in sorted(found.items())]


def _range(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"
