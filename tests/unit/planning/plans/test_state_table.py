"""The table of states that --dry-run prints."""

from __future__ import annotations

import pytest

from moiie_megatron.planning.plans.state_bytes import state_bytes
from moiie_megatron.planning.plans.state_table import format_states
from tests.unit.planning.traces import shipped


def cells(line: str) -> list[str]:
    return line.split()


def test_usual_sizes_that_the_layout_allows() -> None:
    config = shipped("llama3-stage2")  # tensor 2, expert 4
    title, *lines = format_states(config, 1).splitlines()
    assert cells(title) == ["states", "per", "GPU", "weights", "gradients", "optimizer", "sum"]
    assert [line[:8].strip() for line in lines] == ["8 GPUs", "64 GPUs"]
    for line, world in zip(lines, (8, 64), strict=True):
        (states,) = state_bytes(config, world)
        *_, total, unit = cells(line)
        assert unit == "GiB" and float(total) == pytest.approx(states.total / 2**30, abs=0.005)


def test_a_job_of_known_size_and_the_fullest_stage() -> None:
    config = shipped("llama3-stage2", "parallel.pipeline=2")
    (line,) = format_states(config, 16).splitlines()[1:]
    stages = [one.total for one in state_bytes(config, 16)]
    assert stages[0] != stages[1]
    assert cells(line)[-2] == f"{max(stages) / 2**30:.2f}"
