"""The shipped configurations build, step and fit at full size, and say so in their comments.

``make test`` runs the cheapest case, ``make test-full-size`` all.
"""

from __future__ import annotations

import os
import re

import pytest

from moiie_megatron.cli.plan_inputs import InputOptions, make_inputs, read_unset_config
from moiie_megatron.cli.simulations import simulate_job
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.hardware import GIB, gpu
from moiie_megatron.planning.plans.plan import StagePlan, checked, plan_jobs, stage_plans
from moiie_megatron.planning.plans.state_bytes import state_bytes
from tests.full_size.memory_comments import EXAMPLES, read_figures
from tests.full_size.planned_pages import plan_blocks
from tests.helpers.launch import ROOT

GPU = gpu("h100", 8)
ROUNDING = 0.05  # of figures with one digit after the point
# Buffers that are no parameters, and the padding within Megatron's buffers of gradients.
BUFFERS, PADDING = 1 << 20, 1 << 16

SHIPPED = ("phi3-stage1", "phi3-stage2", "llama3-stage1", "llama3-stage2")
# Pipeline stages are no part of the shipped layouts, and what many nodes may need.
STAGED = ("phi3-stage2", "llama3-stage2")
CASES = [(name, world, 1) for name in SHIPPED for world in (8, 64)]
CASES += [(name, 64, 2) for name in STAGED]
if os.environ.get("MOIIE_TEST_FULL_SIZE") != "1":
    CASES = CASES[:1]


def plans(config: RunConfig, world: int) -> tuple[StagePlan, ...]:
    """Every pipeline stage that differs, with the worst micro-batches and most loaded experts."""
    inputs = make_inputs(config, InputOptions(None, None, "balanced"))
    jobs = plan_jobs(config, world, inputs).for_memory
    traces = checked([simulate_job(job) for job in jobs])
    return stage_plans(config, world, traces, traces)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "world", "pipeline"), CASES)
def test_it_steps_and_fits(name: str, world: int, pipeline: int) -> None:
    path = EXAMPLES / f"{name}.yaml"
    overrides = [] if pipeline == 1 else [f"parallel.pipeline={pipeline}"]
    stages = plans(read_unset_config(path, overrides), world)
    assert len(stages) == pipeline
    for plan in stages:
        passes = {compute.when for compute in plan.trace.compute if compute.flops}
        assert passes >= {"forward", "backward"}
        assert any(compute.when == "update" for compute in plan.trace.compute)
        held, expected = plan.memory, plan.states
        assert 0 <= held.weights - expected.weights < BUFFERS
        assert abs(held.gradients - expected.gradients) < PADDING
        assert abs(held.optimizer - expected.optimizer) < PADDING
        assert plan.free(GPU) >= 0, (held.states / GIB, held.peak.total / GIB)
    if pipeline == 1:
        memory = stages[0].memory
        (written,) = [f for f in read_figures(path) if f.world == world and not f.overrides]
        assert written.states == pytest.approx(memory.states / GIB, abs=ROUNDING)
        assert written.activations == pytest.approx(memory.peak.total / GIB, abs=ROUNDING)


@pytest.mark.parametrize("name", SHIPPED)
def test_comments_name_the_states_of_layouts(name: str) -> None:
    path = EXAMPLES / f"{name}.yaml"
    figures = read_figures(path)
    assert {figure.world for figure in figures if not figure.overrides} >= {8, 64}
    for figure in figures:
        config = read_unset_config(path, figure.overrides)
        states = max(one.total for one in state_bytes(config, figure.world))
        assert figure.states == pytest.approx(states / GIB, abs=ROUNDING), figure


@pytest.mark.parametrize("name", SHIPPED)
def test_comments_have_no_other_figures(name: str) -> None:
    """A number of gigabytes that nothing checks is no longer true one day."""
    for line in (EXAMPLES / f"{name}.yaml").read_text().splitlines():
        comment = line.partition("#")[2]
        if " of states" not in comment:
            assert not re.search(r"\d ?(GB|GiB)\b", comment.replace("80 GB", "")), line


def test_plans_in_pages_have_the_same_figures() -> None:
    blocks = list(plan_blocks())
    assert len(blocks) == 6
    for block in blocks:
        file, _, world, _ = block.command.split()
        found = read_figures(ROOT / file)
        (figures,) = [f for f in found if f.world == int(world) and not f.overrides]
        sentence = (
            f"{figures.states} GiB of weights, gradients and optimizer states and "
            f"{figures.activations} GiB of activations"
        )
        assert sentence in block.text, block.command
