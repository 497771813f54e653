"""Runs tools/evaluate.py and reads what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helpers.launch import ROOT

SECONDS = 600


def command(*words: object) -> list[str]:
    """The command of tools/evaluate.py with these arguments."""
    return [sys.executable, str(ROOT / "tools" / "evaluate.py"), *map(str, words)]


def evaluate(*words: object, variables: Mapping[str, str], code: int = 0) -> str:
    """What tools/evaluate.py prints; it must end with this exit code."""
    done = subprocess.run(
        command(*words),
        env=dict(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def results(out: Path) -> dict[str, Any]:
    """The benchmarks in its results, by name."""
    return dict(json.loads((out / "results.json").read_text())["benchmarks"])


def answers(out: Path, task: str) -> list[dict[str, Any]]:
    """The lines of a task's answers."""
    return [json.loads(line) for line in (out / task / "answers.jsonl").read_text().splitlines()]
