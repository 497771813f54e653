"""Every parallel layout trains like a single process: losses, balance, gradients, routing."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.layout.token_types import MODALITIES
from tests.distributed.joint_runs import (
    FAMILIES,
    STEPS,
    TOLERANCE,
    assert_same_course,
    assert_same_validations,
    read_validations,
)
from tests.helpers.tiny_run import read_metrics, read_routing

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


def assert_same_routing(output: Path, reference: Path) -> None:
    """Two runs sent the same number of tokens to every expert in every step."""
    records, wanted = read_routing(output), read_routing(reference)
    assert [record["step"] for record in records] == [record["step"] for record in wanted]
    for record, want in zip(records, wanted, strict=True):
        assert record["layers"].keys() == want["layers"].keys()
        for number, layer in want["layers"].items():
            for modality in MODALITIES:
                got, part = record["layers"][number][modality], layer[modality]
                place = (record["step"], number, modality)
                assert (got["tokens"], got["load"]) == (part["tokens"], part["load"]), place
                # Probabilities of weights that differ by rounding, see TOLERANCE.
                assert got["prob"] == pytest.approx(part["prob"], abs=TOLERANCE), place


LAYOUTS = (
    *("ep2", "tp2", "dp2", "tp2etp2", "tp2ep2"),
    *("pp2", "pp2block", "pp2first", "pp2last", "pp2virtual"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_like_one(layout: str, single: Path, pair: Path) -> None:
    assert_same_course(read_metrics(pair / layout), read_metrics(single / "moiie"))
    assert_same_routing(pair / layout, single / "moiie")


@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp2virtual", "tp2ep2dp2"])
def test_every_layout_validates_like_one_process(
    layout: str, single: Path, pair: Path, quad: Path
) -> None:
    folder = quad if layout == "tp2ep2dp2" else pair
    assert_same_validations(folder / layout, single / "moiie")
    first, _, last = read_validations(folder / layout)
    assert first["loss"] - last["loss"] > 0.1
    assert len(first["image_counts"]) == 3


@pytest.mark.parametrize("layout", ["ep2", "tp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_train_like_one_process(
    family: str, layout: str, single: Path, pair: Path
) -> None:
    """Biases and norms of single heads are on every tensor-parallel rank, or split with it."""
    steps = read_metrics(single / family)
    assert len(steps) == 5 and steps[0]["lm_loss"] - steps[-1]["lm_loss"] > 0.1
    assert_same_course(read_metrics(pair / f"{family}-{layout}"), steps)
    assert_same_routing(pair / f"{family}-{layout}", single / family)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_every_rank_knows_the_length_that_longrope_depends_on(
    layout: str, single: Path, pair: Path
) -> None:
    long, short = read_metrics(single / "longrope"), read_metrics(single / "shortrope")
    assert_same_course(read_metrics(pair / f"{layout}longrope"), long)
    # The length matters, by more than layouts may differ.
    assert short[0]["grad_norm"] != pytest.approx(long[0]["grad_norm"], rel=3 * TOLERANCE)


def test_four_processes_train_like_one(single: Path, quad: Path) -> None:
    assert_same_course(read_metrics(quad / "tp2ep2dp2"), read_metrics(single / "moiie"))
    assert_same_routing(quad / "tp2ep2dp2", single / "moiie")


def test_virtual_stages_of_a_dense_model(single: Path, pair: Path) -> None:
    (step,), (wanted,) = read_metrics(pair / "dense"), read_metrics(single / "dense")
    for key in ("lm_loss", "grad_norm", "tokens"):
        assert step[key] == pytest.approx(wanted[key], rel=TOLERANCE), key


def test_a_pipeline_stage_without_experts(single: Path, pair: Path) -> None:
    """Of virtual stages."""
    assert_same_course(read_metrics(pair / "one_layer"), read_metrics(single / "one_layer"))
    assert_same_routing(pair / "one_layer", single / "one_layer")


def test_the_reference_really_trains(single: Path) -> None:
    """The comparisons above would hold for runs in which nothing happens."""
    steps = read_metrics(single / "moiie")
    assert len(steps) == STEPS
    losses = [line["lm_loss"] for line in steps]
    assert losses[0] - losses[-1] > 0.2
    assert all(line["grad_norm"] > 0.1 and line["aux_vision"] > 1.9 for line in steps)
    assert len({str(record["layers"]) for record in read_routing(single / "moiie")}) == STEPS


def test_layers_draw_their_routers_apart(single: Path) -> None:
    layers = read_routing(single / "moiie")[0]["layers"]
    assert len(layers) == 2
    first, second = layers.values()
    assert first["vision"]["load"] != second["vision"]["load"]


def test_bf16_stays_near_fp32(single: Path) -> None:
    """bf16 keeps 8 bits: a loss of 6 is known to about 0.4 %, and so are the weights' steps."""
    steps, reference = read_metrics(single / "bf16"), read_metrics(single / "fp32")
    assert len(steps) == len(reference) == 3
    for line, wanted in zip(steps, reference, strict=True):
        assert line["lm_loss"] == pytest.approx(wanted["lm_loss"], rel=0.02)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)
        assert line["lm_loss"] != wanted["lm_loss"]
