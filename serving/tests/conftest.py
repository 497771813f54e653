"""Environment of the engines, and what transformers answers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before vLLM is imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines in this process; servers have their own
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
ROWS, REMARKS = pytest.StashKey[list[str]](), pytest.StashKey[list[str]]()
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exports and the answers that ``material.py`` writes.

    ``MOIIE_MATERIAL`` names a directory that it has written before.
    """
    if given := os.environ.get("MOIIE_MATERIAL"):
        return Path(given)
    out = tmp_path_factory.mktemp("material")
    python = os.environ.get("MOIIE_PYTHON", str(ROOT / ".venv/bin/python"))
    run = os.environ.get("MOIIE_DEMO", str(ROOT / "runs/demo"))
    command = [python, str(HERE / "material.py"), str(Path(run).absolute()), str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment, timeout=600)
    return out


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to the table that is printed at the end: what, equal, of how many, difference."""
    rows = request.config.stash.setdefault(ROWS, [])

    def add(what: str, equal: int, total: int, difference: float | None = None) -> None:
        last = "-" if difference is None else f"{difference:.1e}"
        rows.append(f"| {what} | {equal}/{total} | {last} |")

    return add


@pytest.fixture(scope="session")
def remark(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line below the table."""
    return request.config.stash.setdefault(REMARKS, []).append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was compared, as a table."""
    if rows := config.stash.get(ROWS, []):
        head = (
            "| what | tokens equal | largest difference of a log-probability |",
            "|---|---|---|",
        )
        for line in ("", *head, *rows, *config.stash.get(REMARKS, [])):
            terminalreporter.write_line(line)
