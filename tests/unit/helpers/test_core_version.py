"""Every process of the tests imports the Megatron-Core that the tests are meant for."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, environment, python, torchrun

# The metadata finds the first of several installed ones, the import need not: both must agree.
# Newer releases add the commit of a repository around them to __version__.
PROGRAM = """
from importlib.metadata import version
import megatron.core
assert megatron.core.__version__.split("+")[0] == version("megatron-core")
print(version("megatron-core"))
"""


@pytest.fixture(scope="module")
def wanted() -> str:
    """What ``make test-newest-core`` names, otherwise what is installed."""
    return os.environ.get("MOIIE_TEST_CORE") or version("megatron-core")


@pytest.mark.parametrize("start", ["python", "fork", "torchrun"])
def test_every_process_imports_it(start: str, wanted: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = {
        "python": [sys.executable],
        "fork": [python()],  # Python itself without a fork server
        "torchrun": torchrun(1),
    }[start]
    finished = subprocess.run(
        [*words, str(program)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.stdout.strip() == wanted, finished.stderr[-2000:]


def test_this_process_imports_it(wanted: str) -> None:
    import megatron.core

    assert megatron.core.__version__.split("+")[0] == version("megatron-core") == wanted
