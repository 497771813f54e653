"""The benchmarks start; the cheap ones run to their ends."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import ROOT, command, run

BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they take from the package is there, or this raises; nothing more is tested."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(path))


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of ``benchmarks/layer.py``, whose cases are none; ``started`` are their names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    main = runpy.run_path(str(ROOT / "benchmarks" / "layer.py"))["main"]
    names: dict[str, Any] = main.__globals__
    started = names["started"] = []

    def run_child(command: Sequence[str]) -> str:
        name = command[command.index("--only") + 1]
        assert command[0] == sys.executable and "--rounds=3" in command
        started.append(name)
        hidden, ffn, dtype = names["CASES"][name]
        result = {"hidden": hidden, "ffn": ffn, "dtype": dtype, "limit_ms": 5.0}
        ratios = {"moiie_over_limit": 1.0, "moiie_over_fastest_peer": 0.9, "fastest_peer": "loop"}
        return "a warning\n" + json.dumps(result | ratios | {"peers_over_limit": {"loop": 1.1}})

    names["run_child"] = run_child
    return names


@pytest.mark.parametrize(
    ("words", "bf16", "cases"),
    [
        (["--cases", "fp32"], True, ["1024-fp32", "256-fp32"]),
        (["--cases", "256-bf16,1024"], False, ["1024-fp32", "1024-bf16", "256-bf16"]),
        ([], True, ["1024-fp32", "1024-bf16", "256-fp32", "256-bf16"]),
        ([], None, ["1024-fp32", "1024-bf16", "256-fp32", "256-bf16"]),
        ([], False, ["1024-fp32", "256-fp32"]),
    ],
)
def test_cases_of_the_layer(
    words: list[str],
    bf16: bool | None,
    cases: list[str],
    layer: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layer["has_bf16_instructions"] = lambda: bf16
    layer["main"]([*words, "--rounds", "3", "--json", str(tmp_path / "result.json")])
    assert layer["started"] == cases
    found = json.loads((tmp_path / "result.json").read_text())["cases"]
    assert [f"{case['hidden']}-{case['dtype']}" for case in found] == cases
    printed = capsys.readouterr()
    assert printed.out.count("| over limit: moiie 1.000  loop 1.100  |") == len(cases)
    assert ("no BF16 instructions" in printed.err) == (bf16 is False and not words)


def test_a_case_that_is_none(layer: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        layer["main"](["--cases", "fp32,fp64"])
    assert "'fp64' is none of 1024-fp32, 1024-bf16, 256-fp32, 256-bf16" in capsys.readouterr().err


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


@pytest.mark.slow
def test_generate(tmp_path: Path) -> None:
    """Megatron's tokens are the export's, or the benchmark fails."""
    file = tmp_path / "result.json"
    sizes = ["--layers", "2", "--hidden", "192", "--ffn", "64", "--vocabulary", "128"]
    counts = ["--prompt", "8", "--new-tokens", "3", "--rounds", "1", "--threads", "1"]
    run(command("benchmarks/generate.py", [*sizes, *counts, "--json", file]), timeout=120).check()
    result = json.loads(file.read_text())
    ratios = {"batch1_over_llama", "batch8_over_llama", "megatron_over_export"}
    assert all(result[name] > 0 for name in ratios)
    for batch in (1, 8):
        assert result[f"batch{batch}_ms_per_token"].keys() == {"llama", "export", "megatron"}


def test_packing(tmp_path: Path) -> None:
    """Packing over the global batch, against every rank alone: fewer rows, and even ones."""
    file = tmp_path / "result.json"
    run(command("benchmarks/packing.py", ["--steps", "4", "--json", file]), timeout=120).check()
    found = {
        (line["mixture"], line["ranks"], line["global_batch_size"], line["together"]): line
        for line in json.loads(file.read_text())
    }
    for (mixture, ranks, batch, together), line in found.items():
        if not together:
            continue
        alone = found[mixture, ranks, batch, False]
        assert line["tokens_per_row"] >= alone["tokens_per_row"]
        assert line["tokens"] <= alone["tokens"] and line["waiting"] <= alone["waiting"]
        if batch > ranks:  # else every rank has one sample
            assert line["tokens"] < 1.15 and line["images"] < 1.25 and line["waiting"] < 1.35
    # 64 GPUs with two tensor-parallel ranks.
    together, alone = (found["LLaVA-1.5", 32, 128, value] for value in (True, False))
    assert together["tokens_per_row"] > 1.6 * alone["tokens_per_row"]
