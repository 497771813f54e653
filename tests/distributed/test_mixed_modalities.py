"""Ranks that hold only text, only images, or both in other orders: no hang, right numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import command, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import tiny_values, write_config

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

MODES = ("plain", "recompute", "plain overlapped", "recompute overlapped")
WORKER = "tests/distributed/mixed_worker.py"


@pytest.fixture(scope="session")
def courses(tmp_path_factory: pytest.TempPathFactory, digits: Path, single: Path) -> dict[str, Any]:
    """Steps by number of processes, rank and mode; two processes share the experts."""

    def make(folder: Path) -> None:
        values = tiny_values(digits, folder / "unused")
        values["checkpoint"]["init_from"] = str(single / "seed")
        config = write_config(folder / "run.yaml", values)
        for processes in (1, 2):
            out = folder / str(processes)
            out.mkdir()
            words = [config, out, f"parallel.expert={processes}"]
            # A hang ends here.
            run(command(WORKER, words, processes), timeout=100).check()

    folder = made_once(session_folder(tmp_path_factory) / "mixed", make)
    return {
        name: json.loads((folder / name).with_suffix(".json").read_text())
        for name in ("1/rank0", "2/rank0", "2/rank1")
    }


def test_every_kind_of_step_was_there(courses: dict[str, Any]) -> None:
    kinds = [[line["kinds"] for line in courses[f"2/rank{rank}"]["plain"]] for rank in (0, 1)]
    assert kinds == [[[0, 0], [1, 0], [0, 0], [1, 1]], [[1, 1], [0, 1], [0, 0], [1, 1]]]


def test_all_ranks_report_the_same(courses: dict[str, Any]) -> None:
    for mode in MODES:
        for first, second in zip(courses["2/rank0"][mode], courses["2/rank1"][mode], strict=True):
            own = {"kinds": 0, "weights": 0}  # the experts differ
            assert first | own == second | own


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_one(mode: str, courses: dict[str, Any]) -> None:
    """fp32 sums in another order, see test_layouts.py."""
    for line, wanted in zip(courses["2/rank0"][mode], courses["1/rank0"][mode], strict=True):
        assert line["image_tokens"] == wanted["image_tokens"]
        for key in ("lm_loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-4), key
        assert line["aux"] == pytest.approx(wanted["aux"], abs=1e-5)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_recompute_changes_nothing(processes: str, courses: dict[str, Any]) -> None:
    """The replay sees its own token types and counts no load twice: the same sums again."""
    course = courses[f"{processes}/rank0"]
    for line, replayed in zip(course["plain"], course["recompute"], strict=True):
        for key in ("lm_loss", "grad_norm"):
            assert replayed[key] == pytest.approx(line[key], rel=1e-6), key
        assert replayed["aux"] == pytest.approx(line["aux"], abs=1e-6)


@pytest.mark.parametrize("rank", ["1/rank0", "2/rank0", "2/rank1"])
@pytest.mark.parametrize("mode", ["plain", "recompute"])
def test_overlapped_communication_changes_nothing(
    mode: str, rank: str, courses: dict[str, Any]
) -> None:
    """Gradients are reduced and weights gathered in other pieces.

    Biases of keys have no gradient but rounding, which Adam divides by its own size.
    """
    steps, wanted = courses[rank][f"{mode} overlapped"], courses[rank][mode]
    assert wanted[0]["weights"] != wanted[-1]["weights"]
    for line, want in zip(steps, wanted, strict=True):
        for key in ("lm_loss", "grad_norm"):
            assert line[key] == pytest.approx(want[key], rel=1e-6), key
        assert line["weights"] == pytest.approx(want["weights"], rel=1e-6, abs=1e-5)


def test_a_step_without_images_has_no_vision_balance(courses: dict[str, Any]) -> None:
    balances = [line["aux"]["vision"] for line in courses["2/rank0"]["plain"]]
    assert balances[2] == 0.0
    # Of the micro-batches half have images: the mean is over those, near top-k = 2.
    assert balances[0] == pytest.approx(2.0, abs=0.5)
    assert balances[3] == pytest.approx(2.0, abs=0.5)
