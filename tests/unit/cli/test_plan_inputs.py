"""What a plan is made from: configurations of other machines, workloads and routing."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.cli.plan_inputs import InputOptions, make_inputs, read_unset_config
from moiie_megatron.cli.simulations import as_planned
from tests.helpers.user_errors import user_error
from tests.unit.planning.traces import CONFIGS, shipped

CONFIG = shipped("llama3-stage2")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_can_be_planned_without_its_variables(path: Path) -> None:
    config = read_unset_config(path, ["train.device=cuda"])
    planned = as_planned(config)
    assert planned.train.device == "cuda" and planned.train.transformer_impl == "local"
    assert planned.model_copy(update={"train": config.train}) == config


def test_workloads_depend_on_the_layout() -> None:
    inputs = make_inputs(CONFIG, InputOptions(None, None, "balanced"))
    typical, worst = inputs.workloads(CONFIG, 8)
    assert len(typical.micro_batches) == 128 // 4
    assert worst.micro_batches[0].images > typical.micro_batches[0].images == 1
    again, _ = inputs.workloads(CONFIG, 16)
    assert len(again.micro_batches) == 128 // 8
    # Drawn once for all layouts with the same micro-batches.
    same = CONFIG.model_copy(update={"parallel": CONFIG.parallel.model_copy(update={"expert": 2})})
    assert inputs.workloads(same, 8)[0] is typical


def test_images_of_a_sample() -> None:
    inputs = make_inputs(CONFIG, InputOptions(None, 3, "balanced"))
    typical, _ = inputs.workloads(CONFIG, 8)
    assert {shape.images for shape in typical.micro_batches} == {3}


def test_a_skew_loads_an_expert() -> None:
    inputs = make_inputs(CONFIG, InputOptions(None, None, "skew=1.4"))
    typical, _ = inputs.workloads(CONFIG, 8)
    routing = inputs.routing(CONFIG, typical)
    assert max(routing.loads(1, "text")) == pytest.approx(1.4 * 2 / 3)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (InputOptions(None, None, "skew=much"), ("--routing", "much")),
        (InputOptions(None, None, "none.jsonl"), ("none.jsonl",)),
        (InputOptions("none.json", None, "balanced"), ("none.json",)),
    ],
)
def test_other_inputs_are_refused(options: InputOptions, parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        make_inputs(CONFIG, options)
