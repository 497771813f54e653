"""A plan as text for people, in Markdown, and as values for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.expert_load import RoutedTokens
from moiie_megatron.planning.hardware import GIB
from moiie_megatron.planning.plans.markdown import table
from moiie_megatron.planning.plans.plan import (
    MARGIN,
    Plan,
    StagePlan,
    rank_loads,
)
from moiie_megatron.planning.step_time import Estimate, work_of
from moiie_megatron.planning.trace import PARTS, RankTrace

_PASSES = ("forward", "recompute", "backward", "update")
_NAMES = {"vision": "vision encoder", "dense_ffn": "dense FFN", "output_layer": "logits and loss"}


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: bytes, seconds and FLOPs of a rank and a step."""
    config, hardware = plan.config, plan.hardware
    time = plan.time
    return {
        "world": plan.world,
        "hardware": {
            "name": hardware.name,
            "memory": hardware.memory,
            "ranks_per_node": hardware.ranks_per_node,
        },
        "layout": layout_values(config),
        "verdict": plan.verdict,
        "sentence": plan.sentence,
        "workload": _workload_values(plan),
        "expert_load": rank_loads(config, plan.routing, plan.typical),
        "stages": [_stage_values(plan, stage) for stage in plan.stages],
        "time": {
            "seconds": _ends(time.seconds),
            "terms": {name: _ends(value) for name, value in time.terms.items()},
            "recompute_seconds": _ends(time.recompute),
            "bubble_fraction": _ends(time.bubble_fraction),
            "tokens_per_second": _ends(time.tokens_per_second),
            "tflops_per_rank": _ends(time.tflops_per_rank),
            "mfu": _ends(time.mfu),
            "bound": time.bound,
            "assumptions": list(time.assumptions),
        },
    }


def layout_values(config: RunConfig) -> dict[str, Any]:
    """The settings that a search changes."""
    parallel = config.active_parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "expert": parallel.expert,
        "expert_tensor": parallel.expert_tensor,
        "micro_batch_size": config.train.micro_batch_size,
        "recompute": recompute_text(config),
    }


def recompute_text(config: RunConfig) -> str:
    """What the decoder recomputes."""
    fields = config.megatron
    granularity = fields.get("recompute_granularity")
    if granularity == "selective":
        return "+".join(fields.get("recompute_modules", ["core_attn"]))
    if granularity == "full":
        layers = fields.get("recompute_num_layers")
        return f"full, {fields.get('recompute_method')} {layers}"
    return "none"


def layout_text(config: RunConfig) -> str:
    """One line: ``TP 2, PP 1, EP 4, micro-batch 1, recompute mlp``."""
    values = layout_values(config)
    words = [f"TP {values['tensor']}", f"PP {values['pipeline']}"]
    if values["virtual_pipeline"] > 1:
        words.append(f"VPP {values['virtual_pipeline']}")
    words.append(f"EP {values['expert']}")
    if values["expert_tensor"] > 1:
        words.append(f"ETP {values['expert_tensor']}")
    return ", ".join(
        [
            *words,
            f"micro-batch {values['micro_batch_size']}",
            f"recompute {values['recompute']}",
        ]
    )


def term_name(term: str) -> str:
    """A part or another term of a step, as tables call it."""
    return _NAMES.get(term, term)


def plan_text(plan: Plan) -> str:
    """The plan in Markdown."""
    config = plan.config
    parts = [
        f"# {plan.world} x {plan.hardware.name}: {layout_text(config)}",
        plan.sentence,
        *_section("Memory of a rank, GiB", _memory_table(plan)),
        *_section("Data of a step", _workload_table(plan)),
        *_section("Sent by a rank in a step, GB", _traffic_table(plan)),
        *_section("TFLOP of a rank in a step", _flops_table(plan)),
        *_section("Step", _time_table(plan)),
        f"The largest term is {term_name(plan.time.bound)}.",
        "## Assumptions",
        "\n".join(f"- {sentence}" for sentence in assumptions(plan)),
    ]
    return "\n\n".join(parts) + "\n"


def plan_summary(plan: Plan) -> str:
    """The verdict and the largest numbers, in Markdown."""
    time = plan.time
    memory = {
        "weights, GiB": [stage.memory.weights for stage in plan.stages],
        "gradients": [stage.memory.gradients for stage in plan.stages],
        "optimizer": [stage.memory.optimizer for stage in plan.stages],
        "activations at the peak": [stage.memory.peak.total for stage in plan.stages],
        "free beside the margin": [stage.free(plan.hardware) for stage in plan.stages],
    }
    rows = [[name, *(f"{value / GIB:.1f}" for value in values)] for name, values in memory.items()]
    step = [
        _row("step, s", time.seconds, "{:.2f}"),
        _row("tokens/s of all GPUs", time.tokens_per_second, "{:,.0f}"),
        _row("MFU", time.mfu, "{:.1%}"),
    ]
    parts = [
        f"# {plan.world} x {plan.hardware.name}: {layout_text(plan.config)}",
        plan.sentence,
        table(["", *(_stage_name(plan, stage, stage.fullest) for stage in plan.stages)], rows),
        table(["", "low", "high"], step),
    ]
    return "\n\n".join(parts) + "\n"


def assumptions(plan: Plan) -> Iterator[str]:
    """All of them, one sentence each."""
    yield f"Memory is planned for {plan.worst.origin}, time for {plan.typical.origin}."
    if plan.config.moe_layers:
        yield f"Experts are chosen by this assumption: {plan.routing.origin}."
    yield (
        f"{MARGIN:.0%} of the GPU's memory is left for what no trace knows: the CUDA context, "
        "NCCL's buffers, workspaces of kernels and the allocator's unused blocks."
    )
    yield from plan.time.assumptions


def _section(title: str, lines: str) -> list[str]:
    return [f"## {title}", lines]


def _stage_name(plan: Plan, stage: StagePlan, trace: RankTrace) -> str:
    if plan.config.parallel.pipeline == 1:
        return f"rank {trace.rank}"
    numbers = stage.stages
    first, last = numbers[0], numbers[-1]
    which = f"{first}" if first == last else f"{first}-{last}"
    if len(numbers) > 1 and last - first + 1 != len(numbers):
        which = ",".join(map(str, numbers))
    return f"stage {which} (rank {trace.rank})"


def _memory_table(plan: Plan) -> str:
    stages, hardware = plan.stages, plan.hardware

    def row(name: str, values: Sequence[float]) -> list[str]:
        return [name, *(f"{value / GIB:.2f}" for value in values)]

    memory = [stage.memory for stage in stages]
    parts = [part for part in PARTS if any(m.peak.activations.get(part) for m in memory)]
    rows = [
        row("weights", [m.weights for m in memory]),
        row("gradients", [m.gradients for m in memory]),
        row("optimizer", [m.optimizer for m in memory]),
        row("activations at the peak", [m.peak.total for m in memory]),
        *(
            row(f"- {term_name(part)}", [m.peak.activations.get(part, 0) for m in memory])
            for part in parts
        ),
        row("sum", [m.total for m in memory]),
        row(f"margin ({MARGIN:.0%})", [stage.margin(hardware) for stage in stages]),
        row("memory of the GPU", [hardware.memory] * len(stages)),
        row("free", [stage.free(hardware) for stage in stages]),
        ["", *(stage.verdict(hardware) for stage in stages)],
        row("checkpoint written", [stage.states.written for stage in stages]),
        row("copy of it in host memory", [_host_copy(plan, stage) for stage in stages]),
    ]
    return table(["", *(_stage_name(plan, stage, stage.fullest) for stage in stages)], rows)


def _host_copy(plan: Plan, stage: StagePlan) -> int:
    return stage.states.written if plan.config.checkpoint.asynchronous else 0


def _workload_values(plan: Plan) -> dict[str, Any]:
    work = work_of(plan.typical)
    positions = sum(shape.positions for shape in plan.typical.micro_batches)
    return {
        "typical": plan.typical.origin,
        "worst": plan.worst.origin,
        "routing": plan.routing.origin if plan.config.moe_layers else None,
        "micro_batches": len(plan.typical.micro_batches),
        "tokens": work.tokens,
        "labels": work.labels,
        "images": work.images,
        "image_fraction": RoutedTokens.of(plan.typical.micro_batches, plan.config).image_fraction,
        "padding_fraction": 1 - work.tokens / max(positions, 1),
    }


def _workload_table(plan: Plan) -> str:
    values = _workload_values(plan)
    loads = rank_loads(plan.config, plan.routing, plan.typical)
    rows = [
        ["micro-batches of a data-parallel rank", str(values["micro_batches"])],
        ["tokens of a data-parallel rank", f"{values['tokens']:,}"],
        ["image tokens", f"{values['image_fraction']:.1%}"],
        ["padding", f"{values['padding_fraction']:.1%}"],
    ]
    if loads is not None and len(loads) > 1:
        mean = sum(loads) / len(loads)
        of_mean = ", ".join(f"{load / mean:.2f}" for load in loads)
        rows.append(["load of expert-parallel ranks over the mean", of_mean])
    return table(["", "value"], rows)


def sent_bytes(trace: RankTrace, micro_batches: int) -> dict[tuple[str, str], int]:
    """Bytes that a rank sends in a step, by process group and operation.

    Args:
        trace: Of the rank, of some of its micro-batches.
        micro_batches: How many a step has.
    """
    sums: dict[tuple[str, str], float] = {}
    for transfer in trace.transfers:
        key = (transfer.group, transfer.operation)
        times = micro_batches / max(trace.micro_batches, 1) if transfer.per_micro_batch else 1
        sums[key] = sums.get(key, 0) + transfer.bytes_sent * times
    return {key: round(value) for key, value in sorted(sums.items()) if value}


def step_flops(trace: RankTrace, micro_batches: int) -> dict[tuple[str, str], float]:
    """FLOPs of a rank in a step, by part and pass; arguments as for ``sent_bytes``."""
    times = micro_batches / max(trace.micro_batches, 1)
    sums: dict[tuple[str, str], float] = {}
    for compute in trace.compute:
        key = (compute.part, compute.when)
        factor = 1 if compute.when == "update" else times
        sums[key] = sums.get(key, 0.0) + compute.flops * factor
    return sums


def _traffic_table(plan: Plan) -> str:
    count = len(plan.typical.micro_batches)
    by_stage = [sent_bytes(stage.trace, count) for stage in plan.stages]
    keys = sorted({key for sent in by_stage for key in sent})
    rows = [
        [group, operation, *(f"{sent.get((group, operation), 0) / 1e9:.3f}" for sent in by_stage)]
        for group, operation in keys
    ]
    return table(
        ["group", "operation", *(_stage_name(plan, s, s.trace) for s in plan.stages)], rows
    )


def _flops_table(plan: Plan) -> str:
    """Of every pipeline rank that differs, by part; recomputation in brackets."""
    count = len(plan.typical.micro_batches)
    by_stage = [step_flops(stage.trace, count) for stage in plan.stages]
    rows = [
        [term_name(part), *(_flops_cell(part, flops) for flops in by_stage)]
        for part in PARTS
        if any(flops.get((part, when)) for flops in by_stage for when in _PASSES)
    ]
    totals = [sum(flops.values()) for flops in by_stage]
    rows.append(["sum", *(f"{total / 1e12:.1f}" for total in totals)])
    return table(
        ["(of which recomputed)", *(_stage_name(plan, s, s.trace) for s in plan.stages)], rows
    )


def _flops_cell(part: str, flops: Mapping[tuple[str, str], float]) -> str:
    total = sum(flops.get((part, when), 0.0) for when in _PASSES)
    again = flops.get((part, "recompute"), 0.0)
    return f"{total / 1e12:.1f}" + (f" ({again / 1e12:.1f})" if again else "")


def _time_table(plan: Plan) -> str:
    time = plan.time
    terms = sorted(time.terms.items(), key=lambda item: -item[1].middle)
    rows = [
        _row("step, s", time.seconds, "{:.2f}"),
        *(
            _row(f"- {term_name(name)}", value, "{:.3f}")
            for name, value in terms
            if value.high >= 5e-4
        ),
        _row("recomputation in it, s", time.recompute, "{:.3f}"),
        _row("pipeline bubble, fraction", time.bubble_fraction, "{:.1%}"),
        _row("tokens/s of all GPUs", time.tokens_per_second, "{:,.0f}"),
        _row("model TFLOP/s per GPU", time.tflops_per_rank, "{:.0f}"),
        _row("MFU", time.mfu, "{:.1%}"),
    ]
    return table(["", "low", "high"], rows)


def _row(name: str, value: Estimate, form: str) -> list[str]:
    return [name, form.format(value.low), form.format(value.high)]


def _stage_values(plan: Plan, stage: StagePlan) -> dict[str, Any]:
    count = len(plan.typical.micro_batches)
    memory = stage.memory
    return {
        "stages": list(stage.stages),
        "rank": stage.trace.rank,
        "fullest_rank": stage.fullest.rank,
        "verdict": stage.verdict(plan.hardware),
        "memory": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.peak.total,
            "activations_by_part": dict(memory.peak.activations),
            "peak_in": memory.peak.when,
            "margin": stage.margin(plan.hardware),
            "free": stage.free(plan.hardware),
        },
        "checkpoint_written": stage.states.written,
        "checkpoint_copy_in_host_memory": _host_copy(plan, stage),
        "sent": [
            {"group": group, "operation": operation, "bytes": sent}
            for (group, operation), sent in sent_bytes(stage.trace, count).items()
        ],
        "flops": [
            {"part": part, "when": when, "flops": flops}
            for (part, when), flops in step_flops(stage.trace, count).items()
        ],
        "expert_rows": {str(k): list(v) for k, v in stage.trace.expert_rows.items()},
    }


def _ends(value: Estimate) -> list[float]:
    return [value.low, value.high]
