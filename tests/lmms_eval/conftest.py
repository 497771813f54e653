"""Collected where ``MOIIE_TEST_EVAL`` names the Python of lmms-eval (``make test-eval``)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT

if "MOIIE_TEST_EVAL" not in os.environ:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def eval_python() -> str:
    """The Python of lmms-eval's environment."""
    return os.environ["MOIIE_TEST_EVAL"]


@pytest.fixture(scope="session")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that finds no data set but the local ones."""
    home = str(tmp_path_factory.mktemp("hf"))
    return {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def sets(
    eval_python: str, variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Tiny data sets in the benchmarks' formats; ``damaged`` has a damaged POPE."""
    out = tmp_path_factory.mktemp("sets")
    command = [eval_python, ROOT / "tests" / "lmms_eval" / "write_sets.py", out, out / "damaged"]
    subprocess.run(command, env=variables, check=True, capture_output=True)
    return out
