"""What is logged about routing equals a count from the routers' outputs by other means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.config.load import load_config
from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.planning.expert_load import rows_per_token
from moiie_megatron.planning.routing import replayed
from tests.helpers.launch import command, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import read_routing, tiny_values, write_config

# The time limit counts the runs, which the first test of a session waits for.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = "tests/distributed/routing_worker.py"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE_ALONE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
EP_PP = {"expert": 2, "pipeline": 2}
# Two micro-batches per step each; four processes.
RUNS: dict[str, dict[str, Any]] = {
    "full": {"parallel": EP_PP, "megatron": FULL},
    "selective": {"parallel": EP_PP, "megatron": MOE_ALONE},
    "tensor": {"parallel": {"expert": 2, "tensor": 2}, "megatron": MOE_ALONE},
    "joint": {"parallel": EP_PP, "moe": {"variant": "vanilla", "dispatcher": "alltoall"}},
}
STEPS = 5
# Every third step, and before every checkpoint: after steps 2, 4 and 5.
RECORDS = {2: 2, 3: 1, 4: 1, 5: 1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    def make(folder: Path) -> None:
        files = []
        for name, sections in RUNS.items():
            values = tiny_values(digits, folder / name)
            values["train"] |= {"steps": STEPS}
            values["checkpoint"] = {"interval": 2}
            values["log"] = {"routing_interval": 3}
            files.append(write_config(folder / f"{name}.yaml", {**values, **sections}))
        run(command(WORKER, [folder, *files], processes=4), timeout=300).check()

    return made_once(session_folder(tmp_path_factory) / "routing_log", make)


def counted(folder: Path, name: str) -> list[dict[str, Any]]:
    """The counts of every rank of a run."""
    files = sorted((folder / name).glob("rank*.json"))
    assert len(files) == 4
    return [json.loads(file.read_text()) for file in files]


def total(counts: list[dict[str, Any]], steps: range, layer: str, kind: str, key: str) -> Any:
    """One count over ranks and steps; a list is added up expert by expert."""
    found = [
        rank["steps"][str(step)][layer][kind][key]
        for rank in counts
        for step in steps
        if layer in rank["steps"][str(step)]
    ]
    if isinstance(found[0], list):
        return [sum(values) for values in zip(*found, strict=True)]
    return sum(found)


@pytest.mark.parametrize("name", RUNS)
def test_the_log_is_the_count(name: str, folder: Path) -> None:
    counts, records = counted(folder, name), read_routing(folder / name)
    assert {record["step"]: record["steps"] for record in records} == RECORDS
    for record in records:
        steps = range(record["step"] - record["steps"] + 1, record["step"] + 1)
        assert record["layers"].keys() == {"1", "3"}
        for number, layer in record["layers"].items():
            for kind in ("vision", "text", "padding"):
                part = layer[kind]
                for key in ("rows", "remote_rows"):
                    assert part[key] == total(counts, steps, number, kind, key), (kind, key)
                if kind == "padding":
                    continue
                tokens = total(counts, steps, number, kind, "tokens")
                assert tokens > 50 and part["tokens"] == tokens
                load = total(counts, steps, number, kind, "load")
                assert part["load"] == load
                assert part["fraction"] == pytest.approx([x / tokens for x in load], abs=1e-6)
                prob = total(counts, steps, number, kind, "prob")
                assert part["prob"] == pytest.approx([x / tokens for x in prob], abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_a_replay_expects_the_rows_of_the_run(name: str, folder: Path) -> None:
    """Exactly: two of three experts, or a row per expert, leave no choice but the loads."""
    config, records = load_config(folder / f"{name}.yaml", []), read_routing(folder / name)
    file, layers = folder / name / "routing.jsonl", config.moe_layers
    routing = replayed(file, config.moe.layout, layers, last=STEPS)
    for layer in layers:
        expected = rows_per_token(routing, layer, config.placement, config.moe.dispatcher)
        for modality, per_token in zip(MODALITIES, expected.sum(axis=1), strict=True):
            parts = [record["layers"][str(layer)][modality] for record in records]
            tokens, rows = (sum(part[key] for part in parts) for key in ("tokens", "rows"))
            assert tokens * per_token == pytest.approx(rows, abs=1e-3)


@pytest.mark.parametrize(("name", "expected"), [("full", 4 * 1 * 2 * STEPS), ("joint", 0)])
def test_layers_were_replayed(name: str, expected: int, folder: Path) -> None:
    """Four ranks with one MoE layer each, two micro-batches per step."""
    assert sum(rank["replayed"] for rank in counted(folder, name)) == expected


def test_rows_travel(folder: Path) -> None:
    """The comparison above would hold for runs in which nothing is sent."""
    for name in RUNS:
        for kind, moved in read_routing(folder / name)[-1]["moved"].items():
            assert 0 < moved["remote_rows"] < moved["rows"], (name, kind)
            assert moved["bytes"] > moved["remote_rows"] * 4 * 64 * 4
