"""The catalogue says what the installed lmms-eval says: a task that it renames is found here."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from moiie_megatron.evaluation.benchmarks.catalogue import BENCHMARKS, LMMS_EVAL, Benchmark
from moiie_megatron.evaluation.benchmarks.data_sets import cache_name
from moiie_megatron.evaluation.benchmarks.environment import find_environment
from tests.helpers.launch import ROOT


@pytest.fixture(scope="module")
def installed(eval_python: str, variables: dict[str, str]) -> dict[str, Any]:
    program = ROOT / "tests" / "lmms_eval" / "read_tasks.py"
    command = [eval_python, program, *(benchmark.task for benchmark in BENCHMARKS)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.task)
def test_as_in_lmms_eval(installed: dict[str, Any], benchmark: Benchmark) -> None:
    found, data = installed[benchmark.task], benchmark.data[0]
    assert benchmark.metric in found["metrics"]
    assert (data.name, data.config, data.split) == (found["path"], found["config"], found["split"])
    assert cache_name(data.name) == found["cache"]


def test_environment(eval_python: str, variables: dict[str, str]) -> None:
    environment = find_environment(eval_python, variables)
    assert environment.version == LMMS_EVAL
    assert {benchmark.task for benchmark in BENCHMARKS} <= {*environment.tasks}
