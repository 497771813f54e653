"""tools/selftest.py: its whole CPU part, on one process and on two, and ranks in trouble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.selftest.catalogue import CHECKS
from tests.helpers.launch import command, run

TOOL = "tools/selftest.py"
HOOKS = "tests.cli.selftest_hooks"


def selftest(
    file: Path, *words: str, processes: int = 1, hook: str | None = None
) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and output."""
    arguments = ["--device", "cpu", "--json", file, "--directory", file.parent, *words]
    name = None if hook is None else f"{HOOKS}:{hook}"
    done = run(command(TOOL, arguments, processes, hook=name), timeout=250)
    report = json.loads(file.read_text()) if file.exists() else {}
    return done.code, report, done.stdout + done.stderr


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    return {name: check["status"] for name, check in report["checks"].items()}


@pytest.mark.slow
def test_everything_on_one_process(tmp_path: Path) -> None:
    code, report, output = selftest(tmp_path / "report.json")
    assert code == 0, output
    wanted = {check.name: "PASS" for check in CHECKS} | {"te": "SKIP"}
    assert verdicts(report) == wanted and report["status"] == "PASS"
    assert report["device"] == "cpu" and report["ranks"] == 1
    for check in report["checks"].values():
        assert check["reason"] and f"{check['status']}  " in output
    speed = report["checks"]["step-speed"]["figures"]
    assert speed["tokens_per_second_per_rank"] > 0 and len(speed["losses"]) > 2
    assert report["checks"]["layer-speed"]["figures"]["moiie_over_limit"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]  # temporary files are gone


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_experts(tmp_path: Path) -> None:
    """Layer, model, losses and logits equal those of one process; checks of speed run too."""
    code, report, output = selftest(tmp_path / "report.json", "--quick", processes=2)
    assert code == 0, output
    assert verdicts(report)["step-speed"] == "SKIP"
    assert {name for name, verdict in verdicts(report).items() if verdict != "PASS"} == {
        "te",
        "step-speed",
    }
    assert report["checks"]["process-groups"]["figures"]["expert_parallel"] == 2
    assert report["checks"]["collectives"]["figures"]["gigabytes_per_second"]["all-to-all"] > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_is_wrong_and_then_leaves(tmp_path: Path) -> None:
    words = ["--only", "grouped-mm", "attention", "layer", "model"]
    code, report, output = selftest(
        tmp_path / "report.json", *words, processes=2, hook="wrong_then_gone"
    )
    assert code == 1, output
    checks = report["checks"]
    assert checks["grouped-mm"]["status"] == "FAIL"
    assert checks["grouped-mm"]["reason"].startswith("rank 1: fp32 rows 16 0 5 43: output/rows")
    assert checks["grouped-mm"]["reason"].endswith("install another version")
    assert checks["attention"]["status"] == "PASS"
    assert checks["layer"]["status"] == "FAIL"
    assert checks["layer"]["reason"].startswith("rank 1: ValueError (planted); not over ")
    assert "planted" in checks["layer"]["trace"]
    assert checks["model"]["status"] == "SKIP"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_is_stuck(tmp_path: Path) -> None:
    code, report, output = selftest(
        tmp_path / "report.json", "--only", "attention", "layer", processes=2, hook="stuck"
    )
    assert code == 1, output
    assert verdicts(report) == {"process-groups": "PASS", "attention": "FAIL", "layer": "SKIP"}
    assert report["checks"]["attention"]["reason"].startswith("not over after 2 s on rank 1: ")
    assert "0 PASS" not in output and "1 FAIL" in output
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_a_mistake_is_one_sentence() -> None:
    done = run(command(TOOL, ["--only", "speed"]), timeout=100)
    assert done.code == 1
    assert done.stderr.startswith("error: --only speed: there is no such check, but versions, ")
    assert done.stderr.count("\n") == 1
