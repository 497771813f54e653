"""Which ranks are simulated, what a plan says about them, and how it is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moiie_megatron.planning.hardware import GIB, gpu
from moiie_megatron.planning.plans.extrapolate import shallow_of, simulate_shallow
from moiie_megatron.planning.plans.jobs import alike_stages, enough_micro_batches, rank_of_stage
from moiie_megatron.planning.plans.plan import MARGIN, Plan, make_plan, plan_jobs
from moiie_megatron.planning.plans.plan_report import (
    layout_text,
    plan_text,
    plan_values,
    sent_bytes,
)
from moiie_megatron.planning.plans.state_bytes import state_bytes
from moiie_megatron.utils.errors import UserError
from tests.unit.planning.traces import MadeSimulation, inputs, rows, shipped, trace, transfer

PIPELINE = shipped("llama3-stage2", "parallel.pipeline=4")


def made_plan(*overrides: str, world: int = 64, gpu_name: str = "h100") -> Plan:
    config = shipped("llama3-stage2", *overrides)
    return make_plan(config, world, gpu(gpu_name), inputs(), MadeSimulation())


def test_stages_that_differ() -> None:
    assert alike_stages(PIPELINE) == [0, 1, 1, 3]
    uneven = shipped(
        "llama3-stage2", "parallel.pipeline=4", "parallel.pipeline_layers=[8, 8, 9, 7]"
    )
    assert alike_stages(uneven) == [0, 1, 2, 3]


def test_the_rank_with_most_to_do() -> None:
    loads = [0.2, 1.0, 1.4, 1.4]  # by expert-parallel rank, which is the rank modulo 4
    assert rank_of_stage(PIPELINE, 64, 0, loads) == 2
    assert rank_of_stage(PIPELINE, 64, 0, [0.2, 3.0, 1.4, 1.4]) == 1
    assert rank_of_stage(PIPELINE, 64, 3, [0.2, 3.0, 1.4, 1.4]) == 48 + 1
    assert rank_of_stage(PIPELINE, 64, 1, None) == 16


@pytest.mark.parametrize(
    ("pipeline", "virtual", "count"), [(1, 1, 1), (4, 1, 4), (4, 2, 8), (8, 1, 8)]
)
def test_as_many_micro_batches_as_are_held_at_once(pipeline: int, virtual: int, count: int) -> None:
    config = shipped(
        "llama3-stage2",
        f"parallel.pipeline={pipeline}",
        f"parallel.virtual_pipeline={virtual}",
        "train.global_batch_size=1024",
    )
    assert len(enough_micro_batches(config, rows(config, 64)).micro_batches) == count


def test_memory_of_a_plan() -> None:
    plan = made_plan("parallel.pipeline=2")
    first, last = plan.stages
    assert (first.stages, last.stages) == ((0,), (1,))
    states = state_bytes(plan.config, 64)
    assert first.memory.states == states[0].total
    assert plan.fullest is first  # holds two micro-batches, and the vision tower
    free = plan.hardware.memory * (1 - MARGIN) - first.memory.total
    assert first.free(plan.hardware) == pytest.approx(free, abs=1)
    assert plan.verdict == "fits"
    assert f"{first.memory.total / GIB:.1f} GiB of 79.1 GiB" in plan.sentence


@pytest.mark.parametrize(
    ("gpu_memory", "verdict", "words"),
    [(36, "fits", "It fits:"), (32, "tight", "less than 20%"), (29, "does not fit", "too many")],
)
def test_verdicts(gpu_memory: int, verdict: str, words: str) -> None:
    plan = made_plan("parallel.pipeline=2", gpu_name=f"{gpu_memory},989,450,50")
    assert 27 < plan.fullest.memory.total / GIB < 27.5
    assert plan.verdict == verdict
    assert words in plan.sentence


def test_one_simulation_where_typical_is_worst() -> None:
    config = shipped("llama3-stage2")
    prepared = plan_jobs(config, 8, inputs())
    assert len(prepared.jobs) == 1 and not prepared.for_time


def test_a_layout_that_cannot_be_built_says_why() -> None:
    def refuse(jobs: object) -> list[UserError]:
        return [UserError("it needs a GPU")]

    with pytest.raises(UserError, match="it needs a GPU"):
        make_plan(shipped("llama3-stage2"), 8, gpu("h100"), inputs(), refuse)


def test_few_layers_tell_of_many() -> None:
    """What is linear in decoder layers and in those of the vision tower is met exactly."""
    made = MadeSimulation()
    config = shipped("llama3-stage2", "parallel.pipeline=2")
    jobs = plan_jobs(config, 64, inputs()).jobs
    deep = made(jobs)
    made.jobs.clear()
    # Of memory the peak alone is known.
    peaks = [replace(one, memory=replace(one.memory, timeline=(one.memory.peak,))) for one in deep]
    assert simulate_shallow(jobs, made) == peaks
    assert [job.config.language.num_layers for job in made.jobs] == [4, 8, 4, 4, 8]
    assert [job.config.vision.num_feature_layers for job in made.jobs] == [2, 2, 3, 2, 2]


@pytest.mark.parametrize(
    "override",
    [
        "moe.layers=[1, 2, 30]",
        "parallel={pipeline: 2, pipeline_layers: [15, 17], tensor: 2, expert: 4}",
        "megatron={recompute_granularity: full, recompute_method: block, recompute_num_layers: 3}",
    ],
)
def test_layers_that_differ_are_not_extrapolated(override: str) -> None:
    assert shallow_of(shipped("llama3-stage2")) is not None
    assert shallow_of(shipped("llama3-stage2", override)) is None


def test_bytes_of_a_step() -> None:
    one = trace(
        transfer("tp", (0, 1), bytes_sent=6),
        transfer("tp", (0, 1), when="backward", bytes_sent=8),
        transfer("dp", (0, 1), per_micro_batch=False, bytes_sent=100),
        transfer("world", (0, 1)),
        micro_batches=2,
    )
    assert sent_bytes(one, 10) == {("tp", "all_reduce"): 70, ("dp", "all_reduce"): 100}


def test_a_plan_as_text_and_as_values() -> None:
    plan = made_plan("parallel.pipeline=4", "checkpoint.asynchronous=true")
    text = plan_text(plan)
    assert text.startswith("# 64 x H100: TP 2, PP 4, EP 4, micro-batch 1, recompute moe\n")
    ranks = [stage.trace.rank for stage in plan.stages]
    header = "| stage 0 (rank {}) | stage 1-2 (rank {}) | stage 3 (rank {}) |".format(*ranks)
    assert header in " ".join(text.split())
    for sentence in plan.time.assumptions:
        assert f"- {sentence}" in text
    values = json.loads(json.dumps(plan_values(plan)))
    assert values["verdict"] == plan.verdict
    assert [stage["stages"] for stage in values["stages"]] == [[0], [1, 2], [3]]
    first = values["stages"][0]
    assert first["memory"]["activations_by_part"]["attention"] > 0
    assert first["checkpoint_copy_in_host_memory"] == first["checkpoint_written"] > 0
    low, high = values["time"]["seconds"]
    assert 0 < low < high
    assert sum(term[0] for term in values["time"]["terms"].values()) == pytest.approx(low)
    assert values["workload"]["image_fraction"] == pytest.approx(729 / 4096)
    assert sum(values["expert_load"]) == pytest.approx(2)  # rows per token, top-2


def test_a_layout_in_words() -> None:
    degrees = "parallel={tensor: 4, pipeline: 2, virtual_pipeline: 4, expert: 2, expert_tensor: 2}"
    full = (
        "megatron={recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"
    )
    assert layout_text(shipped("llama3-stage2", degrees, full)) == (
        "TP 4, PP 2, VPP 4, EP 2, ETP 2, micro-batch 1, recompute full, uniform 1"
    )
