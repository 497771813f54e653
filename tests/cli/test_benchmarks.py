"""The benchmarks start, and one of them runs to its end on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, command, run

BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they take from the package is there, or this raises; nothing more is tested."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(path))


@pytest.mark.slow
def test_dispatch(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    sizes = ["--hidden", "32", "--ffn", "64", "--tokens", "64", "--rounds", "1"]
    run(command("benchmarks/dispatch.py", [*sizes, "--json", file]), timeout=120).check()
    cases = json.loads(file.read_text())["cases"]
    assert [(case["experts"], case["rows_per_token"]) for case in cases] == [(4, 0.0), (8, 0.0)]


@pytest.mark.slow
def test_routing_log(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    sizes = ["--layers", "2", "--hidden", "64", "--ffn", "128", "--tokens", "160", "--rounds", "1"]
    run(command("benchmarks/routing_log.py", [*sizes, "--json", file]), timeout=120).check()
    result = json.loads(file.read_text())
    assert result["processes"] == 1 and result["moe_layers"] == 1
    assert {"counting_overhead", "overhead", "step_ms"} <= result.keys()
