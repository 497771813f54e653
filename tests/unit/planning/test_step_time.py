"""Step times of traces that are small enough to compute by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moiie_megatron.planning.flops import model_flops
from moiie_megatron.planning.hardware import CpuRates, cpu_machine, gpu
from moiie_megatron.planning.step_time import (
    BUBBLE,
    CORES,
    GRADIENTS,
    LAUNCHES,
    WEIGHTS,
    step_time,
    work_of,
)
from moiie_megatron.planning.trace import RankTrace
from tests.unit.planning.traces import compute, rows, shipped, trace, transfer

PLAIN = ("parallel.tensor=1", "parallel.expert=1")
CONFIG = shipped("llama3-stage2", *PLAIN)
WORKLOAD = rows(CONFIG, 1)  # 128 micro-batches
H100 = gpu("h100")
FAST, SLOW = H100.fast, H100.slow


def test_products_run_at_a_fraction_of_the_peak() -> None:
    found = step_time(CONFIG, [trace(compute(flops=10**12))], WORKLOAD, H100)
    assert found.seconds.low == pytest.approx(128 * 1e12 / 989e12 / FAST.products)
    assert found.seconds.high == pytest.approx(128 * 1e12 / 989e12 / SLOW.products)
    assert found.bound == "dense_ffn"


def test_kernels_without_products_take_the_time_of_their_bytes() -> None:
    """So do products whose operands are large for their FLOPs."""
    small = compute(flops=1, bytes=3 * 10**9, matmul_bytes=10**9)
    found = step_time(CONFIG, [trace(small)], WORKLOAD, H100)
    assert found.seconds.low == pytest.approx(
        128 * (1e9 + 2e9 * FAST.unfused) / 3.35e12 / FAST.memory
    )
    assert found.seconds.high == pytest.approx(128 * 3e9 / 3.35e12 / SLOW.memory)


def test_a_pass_takes_as_long_as_its_launches() -> None:
    found = step_time(CONFIG, [trace(compute(kernels=1000))], WORKLOAD, H100)
    assert found.seconds.high == pytest.approx(128 * 1000 * SLOW.launch)
    assert found.bound == LAUNCHES
    # The backward pass of a step with much work hides no launches of the forward pass.
    busy = trace(compute(kernels=1000), compute(when="backward", flops=10**15))
    assert step_time(CONFIG, [busy], WORKLOAD, H100).terms[LAUNCHES].high == pytest.approx(
        128 * 1000 * SLOW.launch
    )


def test_a_trace_may_have_fewer_micro_batches_than_the_step() -> None:
    one = trace(compute(flops=10**12), compute("optimizer", "update", bytes=10**9))
    two = replace(
        one,
        micro_batches=2,
        compute=(compute(flops=2 * 10**12), compute("optimizer", "update", bytes=10**9)),
    )
    assert (
        step_time(CONFIG, [one], WORKLOAD, H100).seconds
        == step_time(CONFIG, [two], WORKLOAD, H100).seconds
    )


def test_recomputation_takes_time_and_is_no_model_flop() -> None:
    parts = (compute(flops=10**12), compute(when="backward", flops=2 * 10**12))
    without = step_time(CONFIG, [trace(*parts)], WORKLOAD, H100)
    again = compute(when="recompute", flops=10**12)
    found = step_time(CONFIG, [trace(*parts, again)], WORKLOAD, H100)
    assert found.seconds.low == pytest.approx(4 / 3 * without.seconds.low)
    assert found.recompute.low == pytest.approx(found.seconds.low / 4)
    assert found.mfu.high == pytest.approx(3 / 4 * without.mfu.high)
    flops = model_flops(CONFIG).of(work_of(WORKLOAD))
    assert found.tflops_per_rank.low == pytest.approx(flops / found.seconds.high / 1e12)
    assert found.mfu.low == pytest.approx(found.tflops_per_rank.low / 989)
    assert found.tokens_per_second.high == pytest.approx(128 * 4096 / found.seconds.low)


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (4, 1), (4, 2)])
def test_the_bubble_of_equal_stages(pipeline: int, virtual: int) -> None:
    degrees = (f"parallel.pipeline={pipeline}", f"parallel.virtual_pipeline={virtual}")
    config = shipped("llama3-stage2", *PLAIN, *degrees)
    stages = [
        trace(compute(flops=10**12), rank=rank, stage=rank, world=pipeline)
        for rank in range(pipeline)
    ]
    workload = rows(config, pipeline)
    count = len(workload.micro_batches)
    found = step_time(config, stages, workload, H100)
    steady = count * 1e12 / 989e12 / FAST.products
    assert found.terms[BUBBLE].low == pytest.approx(steady * (pipeline - 1) / (virtual * count))
    assert found.seconds.low == pytest.approx(steady + found.terms[BUBBLE].low)


def test_the_slowest_stage_sets_the_pace() -> None:
    config = shipped("llama3-stage2", *PLAIN, "parallel.pipeline=2")
    stages = [
        trace(compute(flops=10**12), world=2),
        trace(compute("output_layer", flops=3 * 10**12), rank=1, stage=1, world=2),
    ]
    workload = rows(config, 2)
    found = step_time(config, stages, workload, H100)
    count = len(workload.micro_batches)
    assert found.seconds.low == pytest.approx((3 * count + 1) * 1e12 / 989e12 / FAST.products)
    assert found.bound == "output_layer"


def data_parallel(hidden_behind: int) -> RankTrace:
    """Gradients and weights of a second each at the full rate of the links."""
    once = {"when": "update", "per_micro_batch": False, "bytes_sent": int(450e9)}
    return trace(
        compute("attention", "forward", flops=hidden_behind),
        compute("attention", "backward", flops=2 * hidden_behind),
        transfer("dp", range(8), "reduce_scatter_single", calls=0, **once),
        transfer("dp", range(8), "all_gather_single", calls=0, **once),
        world=8,
    )


def test_data_parallel_communication_hides_at_best() -> None:
    much = step_time(CONFIG, [data_parallel(10**16)], rows(CONFIG, 8), H100)
    for term in (GRADIENTS, WEIGHTS):
        assert much.terms[term].low == 0.0
        assert much.terms[term].high == pytest.approx(1 / SLOW.links)
    # Not behind more than one backward and one forward pass.
    little = step_time(CONFIG, [data_parallel(10**14)], rows(CONFIG, 8), H100)
    forward = 1e14 / 989e12 / FAST.attention
    assert little.terms[GRADIENTS].low == pytest.approx(1 / FAST.links - 2 * forward)
    assert little.terms[WEIGHTS].low == pytest.approx(1 / FAST.links - forward)


def test_data_parallel_communication_of_a_run_that_does_not_overlap() -> None:
    config = shipped("llama3-stage2", *PLAIN, "ddp.overlap_grad_reduce=false")
    found = step_time(config, [data_parallel(10**16)], rows(CONFIG, 8), H100)
    assert found.terms[GRADIENTS].low == pytest.approx(1 / FAST.links)
    assert found.terms[WEIGHTS].low == pytest.approx(1 / FAST.links)
    assert any("Gradient reduction is not hidden" in line for line in found.assumptions)


def test_terms_add_up_and_assumptions_name_their_values() -> None:
    one = trace(
        compute(flops=10**12, bytes=10**9, kernels=500),
        transfer("tp", (0, 1), bytes_sent=10**8),
        transfer("ep", range(16), "all_to_all_single", bytes_sent=10**8),
        world=16,
    )
    found = step_time(CONFIG, [one], rows(CONFIG, 16), H100)
    assert sum(term.low for term in found.terms.values()) == pytest.approx(found.seconds.low)
    assert sum(term.high for term in found.terms.values()) == pytest.approx(found.seconds.high)
    text = " ".join(found.assumptions)
    assert f"{100 * SLOW.products:.0f} to {100 * FAST.products:.0f} %" in text
    assert "tp inside a node" in text and "ep over the network" in text


def test_ranks_that_share_cores_wait_for_them() -> None:
    rates = CpuRates(50e9, 40e9, 1e9, 0.0, 0.0)
    machine = cpu_machine(2, 1 << 34, rates)
    work = compute(flops=50 * 10**9)

    def seconds(world: int) -> float:
        found = step_time(CONFIG, [trace(work, world=world)], rows(CONFIG, world), machine)
        assert found.seconds.low == found.seconds.high
        return found.seconds.low * world

    # One second for each of 128 micro-batches; two ranks have a core each, four take turns.
    assert seconds(1) == pytest.approx(128)
    assert seconds(2) == pytest.approx(128)
    assert seconds(4) == pytest.approx(256)


def test_pipeline_ranks_compute_while_others_wait_on_shared_cores() -> None:
    """With as few cores as one, a bubble costs nothing."""
    config = shipped("llama3-stage2", *PLAIN, "parallel.pipeline=2")
    stages = [trace(compute(flops=25 * 10**9), rank=r, stage=r, world=2) for r in range(2)]
    one = cpu_machine(1, 1 << 34, CpuRates(50e9, 40e9, 1e9, 0.0, 0.0))
    found = step_time(config, stages, rows(config, 2), one)
    assert found.seconds.low == pytest.approx(128)
    assert found.terms[CORES].low > 0
    # MFU is of the machine.
    assert found.tflops_per_rank.low * 1e12 / found.mfu.low == pytest.approx(50e9 / 2)
