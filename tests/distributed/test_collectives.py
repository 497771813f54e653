"""No hang: the collectives of all ranks fit together (``evaluation/collective_order.py``).

Layouts of the comparison table are in ``tests/cli/test_compare_runs.py``; here are whole training
runs with checkpoints and logs, in which ranks hold only text, only images, or both.
"""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.evaluation.collective_order import find_conflict
from moiie_megatron.evaluation.collective_recorder import Call, Event
from tests.helpers.launch import command, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import tiny_values, write_config

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = "tests/distributed/collectives_worker.py"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PACKED = {"packing": True}
FIXED = {"padding": "sequence_length"}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


# GPUs batch the sends and receives of a pipeline; without that they are one after the other.
BATCHED = {"batch_p2p_comm": True}
EP2, PP2, TP2 = {"expert": 2}, {"pipeline": 2}, {"tensor": 2}
RUNS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ep2": {"parallel": EP2, "data": PACKED, "megatron": FULL},
        "ep2-alltoall": {
            "parallel": EP2, "moe": {"dispatcher": "alltoall"}, "megatron": selective("moe"),
        },
        "ep2-allgather": {
            "parallel": EP2, "moe": {"dispatcher": "allgather"}, "data": PACKED | FIXED,
        },
        "dp2-connector": {"stage": "connector", "megatron": FULL},
        "pp2": {"parallel": PP2, "data": PACKED, "megatron": FULL | BATCHED},
        "pp2-connector": {"stage": "connector", "parallel": PP2, "megatron": BATCHED},
        "pp2-one-by-one": {"parallel": PP2, "data": FIXED, "megatron": selective("core_attn")},
        "tp2": {
            "parallel": TP2 | EP2, "data": PACKED, "megatron": selective("layernorm", "moe_act"),
        },
        "tp2-connector": {"stage": "connector", "parallel": TP2, "data": PACKED},
        "tp2-etp2": {"parallel": TP2 | {"expert_tensor": 2}, "megatron": selective("moe")},
    },
    4: {
        "pp2-ep2": {"parallel": PP2 | EP2, "data": PACKED, "megatron": FULL | BATCHED},
        "tp2-ep2-dp2": {"parallel": TP2 | EP2, "megatron": selective("moe")},
        "tp2-pp2": {
            "parallel": TP2 | PP2, "data": PACKED | FIXED, "megatron": BATCHED,
            "moe": {"dispatcher": "alltoall"},
        },
    },
}  # fmt: skip
NAMES = [(processes, name) for processes, runs in RUNS.items() for name in runs]
Records = list[list[Event]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Runs of three steps, two micro-batches each; a checkpoint and a routing record per step."""

    def make(folder: Path) -> None:
        for processes, runs in RUNS.items():
            files = []
            for name, sections in runs.items():
                values = tiny_values(digits, folder / name, sections.get("stage", "joint"))
                degrees = sections.get("parallel", {})
                dp_size = processes // degrees.get("tensor", 1) // degrees.get("pipeline", 1)
                values["train"] |= {"steps": 3, "global_batch_size": 4 * dp_size}
                values["data"] |= {"sequence_length": 48, **sections.get("data", {})}
                own = {k: v for k, v in sections.items() if k not in ("stage", "data")}
                values["checkpoint"] = {"interval": 2}
                files.append(write_config(folder / f"{name}.yaml", {**values, **own}))
            # A hang ends here.
            run(command(WORKER, [folder, *files], processes), timeout=300).check()

    return made_once(session_folder(tmp_path_factory) / "collectives", make)


def read(folder: Path, name: str) -> tuple[Records, list[Counter[str]]]:
    """The records of all ranks of a run, and the flight recorder's counts by group."""
    files = sorted((folder / name).glob("rank*.pickle"))
    found = [pickle.loads(file.read_bytes()) for file in files]
    return [events for events, _ in found], [counted for _, counted in found]


@pytest.mark.parametrize(("processes", "name"), NAMES)
def test_the_ranks_fit_together(processes: int, name: str, folder: Path) -> None:
    records, counts = read(folder, name)
    assert len(records) == processes
    assert find_conflict(records) is None
    # Nothing has passed the recorder by: torch's own has counted as many, group by group.
    for events, counted in zip(records, counts, strict=True):
        calls = [e for e in events if isinstance(e, Call) and not e.is_point_to_point]
        assert Counter(call.group for call in calls) == counted
        assert len(calls) > 50


def test_ranks_differed_in_what_they_sent(folder: Path) -> None:
    """The comparison would hold for ranks that do the same."""
    first, second = read(folder, "ep2")[0]
    splits = [
        [e.input_splits for e in events if isinstance(e, Call) and e.input_splits]
        for events in (first, second)
    ]
    assert len(splits[0]) == len(splits[1]) > 20
    assert sum(a != b for a, b in zip(*splits, strict=True)) > 10
