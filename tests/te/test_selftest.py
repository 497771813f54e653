"""tools/selftest.py where Transformer Engine is: what it skips elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import command, run

CHECKS = ("te", "checkpoints", "layer-speed", "step-speed")


@pytest.mark.slow
def test_checks_with_transformer_engine(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    words = command(
        "tools/selftest.py",
        ["--device", "cpu", "--json", file, "--only", *CHECKS],
        hook="tests.te.selftest_hooks:references_without",
    )
    done = run(words, timeout=250)
    assert done.code == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())["checks"]
    assert {report[name]["status"] for name in CHECKS} == {"PASS"}
    assert report["process-groups"]["figures"]["transformer_engine"]
    assert set(report["te"]["figures"]) == {"padded fp32", "padded bf16", "packed bf16"}
    # Nothing is TF32 here, so what is left is the order of sums.
    assert max(report["te"]["figures"]["padded fp32"].values()) < 1e-3
    assert "moiie, TE experts" in report["layer-speed"]["figures"]["milliseconds"]
