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
from moiie_megatron.evaluation.collective_recorder import Call, Event, Wait
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


EP2, PP2, TP2 = {"expert": 2}, {"pipeline": 2}, {"tensor": 2}
VIRTUAL = {**PP2, "virtual_pipeline": 2}
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
        "pp2": {"parallel": PP2, "data": PACKED, "megatron": FULL},
        "pp2-connector": {"stage": "connector", "parallel": PP2},
        "pp2-one-by-one": {"parallel": PP2, "data": FIXED, "megatron": selective("core_attn")},
        "pp2-virtual": {"parallel": VIRTUAL, "data": PACKED, "megatron": FULL},
        "pp2-virtual-connector": {"stage": "connector", "parallel": VIRTUAL, "data": FIXED},
        "tp2": {
            "parallel": TP2 | EP2, "data": PACKED, "megatron": selective("core_attn", "mlp"),
        },
        "tp2-connector": {"stage": "connector", "parallel": TP2, "data": PACKED},
        "tp2-etp2": {"parallel": TP2 | {"expert_tensor": 2}, "megatron": selective("moe")},
    },
    4: {
        "pp2-ep2": {"parallel": PP2 | EP2, "data": PACKED, "megatron": FULL},
        "pp2-virtual-ep2": {"parallel": VIRTUAL | EP2, "data": PACKED},
        "tp2-ep2-dp2": {"parallel": TP2 | EP2, "megatron": selective("moe")},
        "tp2-pp2": {
            "parallel": TP2 | PP2, "data": PACKED | FIXED,
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
        calls: Counter[str] = Counter()
        for event in events:
            if isinstance(event, Call) and not event.is_point_to_point:
                # Gloo scatters a list of reductions as one reduction each.
                is_list = event.operation == "reduce_scatter"
                calls[event.group] += len(event.inputs) if is_list else 1
        assert calls == counted
        assert calls.total() > 50


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dtype", "the dtype differs: rank 0 at event 0: all_gather_single"),
        ("order", "the shape differs: rank 0 at event 0: all_reduce"),
        ("skipped", "no rank can go on: rank 0 at event 1: all_reduce"),
    ],
)
def test_what_gloo_lets_pass_is_found(name: str, reason: str, folder: Path) -> None:
    records, _ = read(folder, f"planted-{name}")
    conflict = find_conflict(records)
    assert conflict is not None and reason in conflict


@pytest.mark.parametrize("name", ["ep2", "pp2"])
def test_any_call_less_is_found(name: str, folder: Path) -> None:
    """Also of the sends and receives of a pipeline."""
    first, second = read(folder, name)[0]
    for position, event in enumerate(second):
        if isinstance(event, Call) and len(event.members) > 1:
            found = find_conflict([first, without(second, position)])
            assert found is not None, (position, str(event))


def without(record: list[Event], position: int) -> list[Event]:
    """A record without a call; who waits for later ones finds them a place earlier."""
    events: list[Event] = []
    for event in record[:position] + record[position + 1 :]:
        if isinstance(event, Wait):
            calls = tuple(c - (c > position) for c in event.calls if c != position)
            event = Wait(calls)
        events.append(event)
    return events


def test_any_change_of_a_call_is_found(folder: Path) -> None:
    """Another dtype, a row that goes to another rank, two calls in the other order."""
    first, second = read(folder, "ep2")[0]
    changes = []
    for position, event in enumerate(second):
        if not isinstance(event, Call) or len(event.members) == 1:
            continue
        inputs, outputs = (
            tuple(("int8", shape) for _, shape in kinds) for kinds in (event.inputs, event.outputs)
        )
        changes.append((position, [replace(event, inputs=inputs, outputs=outputs)]))
        if event.input_splits:
            to_first, to_second = event.input_splits
            moved = (to_first - 1, to_second + 1)
            changes.append((position, [replace(event, input_splits=moved)]))
        following = second[position + 1] if position + 1 < len(second) else event
        is_shared = isinstance(following, Call) and len(following.members) > 1
        if is_shared and following != event:
            changes.append((position, [following, event]))
    assert len(changes) > 400
    for position, events in changes[::5]:  # enough, and all would take seconds
        if events[0] == second[position]:
            continue  # a barrier has no dtype
        changed = second[:position] + events + second[position + len(events) :]
        assert find_conflict([first, changed]) is not None, (position, str(events[0]))


def test_ranks_differed_in_what_they_sent(folder: Path) -> None:
    """The comparison would hold for ranks that do the same."""
    first, second = read(folder, "ep2")[0]
    splits = [
        [e.input_splits for e in events if isinstance(e, Call) and e.input_splits]
        for events in (first, second)
    ]
    assert len(splits[0]) == len(splits[1]) > 20
    assert sum(a != b for a, b in zip(*splits, strict=True)) > 10
