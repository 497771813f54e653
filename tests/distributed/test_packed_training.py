"""Packed runs: the losses of the unpacked run, in every layout, and after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.joint_runs import (
    TOLERANCE,
    VIRTUAL,
    assert_same_course,
    assert_same_validations,
    go_back,
    held_out,
    joint_values,
    train_in_turn,
)
from tests.helpers.launch import TRAIN, command, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import read_metrics, read_routing, tiny_values

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 3
# Balance losses are means over micro-batches; without them, packing changes no gradient.
UNBALANCED = {"vision_aux_loss_coeff": 0.0, "text_aux_loss_coeff": 0.0}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def packed(digits: Path, output: Path, seed: Path, **sections: Any) -> Any:
    """Rows of two or three samples; in the third step, one of two ranks alone would need three
    rows and the other four."""
    values = joint_values(digits, output, seed, **sections)
    values["train"] |= {"steps": STEPS, "micro_batch_size": 1}
    values["data"] = {"packing": True, **values["data"], "sequence_length": 128}
    return values


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """One process: a dense ``seed``, and from it runs with and without packing."""

    def make(folder: Path) -> None:
        seed = folder / "seed"
        dense = tiny_values(digits, seed, "dense")
        dense["train"]["steps"] = 1
        two_workers = {**dense["data"], "num_workers": 2}
        runs = {
            "seed": dense,
            "plain": packed(
                digits, folder / "plain", seed, moe=UNBALANCED,
                data={**two_workers, "packing": False, **held_out(digits)},
            ),
            "packed": packed(
                digits, folder / "packed", seed, moe=UNBALANCED,
                data={**two_workers, **held_out(digits)},
            ),
            "balanced": packed(
                digits, folder / "balanced", seed, data=two_workers,
                checkpoint={"interval": 1, "keep": STEPS},
            ),
        }  # fmt: skip
        train_in_turn(folder, runs, processes=1, timeout=300)

    return made_once(session_folder(tmp_path_factory) / "packed_alone", make)


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory, digits: Path, alone: Path) -> Path:
    """Two processes in several layouts, and four; "resumed" goes on from another layout."""

    def make(folder: Path) -> None:
        seed = alone / "seed"
        whole_rows = {**tiny_values(digits, folder)["data"], "padding": "sequence_length"}
        go_back(alone / "balanced", folder / "resumed", 1)
        layouts: dict[str, dict[str, Any]] = {
            "pp2": {"parallel": {"pipeline": 2}},
            "tp2": {"parallel": {"tensor": 2}},
            "resumed": {"parallel": {"tensor": 2}},
            "pp2rows": {"parallel": {"pipeline": 2}, "data": whole_rows},
            "pp2virtual": {
                "parallel": VIRTUAL,
                "moe": UNBALANCED,
                "data": {**whole_rows, **held_out(digits)},
            },
            "ep2": {
                "parallel": {"expert": 2},
                "moe": UNBALANCED,
                "megatron": FULL,
                "data": held_out(digits),
            },
            "allgather": {
                "parallel": {"expert": 2},
                "moe": {**UNBALANCED, "dispatcher": "allgather"},
                "data": whole_rows,
            },
        }
        runs = {
            name: packed(digits, folder / name, seed, **sections)
            for name, sections in layouts.items()
        }
        train_in_turn(folder, runs, processes=2, timeout=400)
        values = packed(digits, folder / "ep2dp2", seed, parallel={"expert": 2}, moe=UNBALANCED)
        train_in_turn(folder, {"ep2dp2": values}, processes=4, timeout=100)

    return made_once(session_folder(tmp_path_factory) / "packed_layouts", make)


def whole_rows(steps: list[dict[str, Any]]) -> list[int]:
    """Rows of every step on all ranks, where each is padded to its capacity of 128 tokens."""
    rows = [line["tokens"] / (1 - line["padding_fraction"]) / 128 for line in steps]
    assert rows == pytest.approx([round(number) for number in rows])
    return [round(number) for number in rows]


def test_packing_changes_no_loss(alone: Path) -> None:
    plain, packed = read_metrics(alone / "plain"), read_metrics(alone / "packed")
    assert len(plain) == len(packed) == STEPS
    for line, wanted in zip(packed, plain, strict=True):
        for key in ("tokens", "label_tokens", "image_fraction"):
            assert line[key] == wanted[key], key
        tolerance = 1e-5 if line["step"] == 1 else TOLERANCE
        for key in ("lm_loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=tolerance), key
    plain_routing, packed_routing = (read_routing(alone / name) for name in ("plain", "packed"))
    for record, other in zip(packed_routing, plain_routing, strict=True):
        for modality in ("vision", "text"):
            fractions, wanted = (r["layers"]["1"][modality]["fraction"] for r in (record, other))
            assert fractions == pytest.approx(wanted, abs=1e-6)
    assert all(line["padding_fraction"] == 0 for line in packed)
    # The comparison would hold for runs in which nothing happens.
    assert packed[0]["lm_loss"] - packed[-1]["lm_loss"] > 0.02


@pytest.mark.parametrize("layout", ["pp2", "tp2", "pp2rows"])
def test_two_processes_train_like_one(layout: str, alone: Path, layouts: Path) -> None:
    steps = read_metrics(layouts / layout)
    assert_same_course(steps, read_metrics(alone / "balanced"))
    if layout == "pp2rows":
        assert all(line["padding_fraction"] > 0.02 for line in steps)
        assert whole_rows(steps) == [3, 3, 6]


@pytest.mark.parametrize("layout", ["ep2", "allgather", "ep2dp2", "pp2virtual"])
def test_ranks_that_share_their_samples(layout: str, alone: Path, layouts: Path) -> None:
    """Rows are packed from the samples of all ranks: the same losses and gradients."""
    steps, reference = read_metrics(layouts / layout), read_metrics(alone / "packed")
    assert len(steps) == len(reference) == STEPS
    for line, wanted in zip(steps, reference, strict=True):
        assert line["tokens"] == wanted["tokens"]
        for key in ("lm_loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=TOLERANCE), key
    if layout == "allgather":
        # As many as one process has, rounded up to a multiple of the ranks.
        assert whole_rows(steps) == [4, 4, 6]
    if layout == "pp2virtual":
        # Three rows are split into four: the schedule takes two at a time.
        assert whole_rows(steps) == [4, 4, 6]


@pytest.mark.parametrize("layout", ["packed", "ep2", "pp2virtual"])
def test_packed_samples_have_the_same_validation_loss(
    layout: str, alone: Path, layouts: Path
) -> None:
    folder = alone if layout == "packed" else layouts
    assert_same_validations(folder / layout, alone / "plain")


def test_resume_in_the_middle(tmp_path: Path, alone: Path, layouts: Path) -> None:
    """In the same layout bit by bit, in another one within rounding."""
    whole = read_metrics(alone / "balanced")
    assert_same_course(read_metrics(layouts / "resumed"), whole)
    again = go_back(alone / "balanced", tmp_path / "again", 1)
    run(command(TRAIN, [alone / "balanced.yaml", f"output={again}"]), timeout=120).check()
    steps = read_metrics(again)
    assert steps[-1]["seconds"] != whole[-1]["seconds"]
    for key in ("step", "lm_loss", "grad_norm", "aux_vision", "aux_text"):
        assert [line[key] for line in steps] == [line[key] for line in whole], key
    assert read_routing(again) == read_routing(alone / "balanced")
