"""The comparison tool: layouts of one step, and the losses of two runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import command, run
from tests.helpers.tiny_run import make_digits, tiny_values, write_config

TOOL = "tools/compare_runs.py"


def _metrics(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": i + 1, "lm_loss": x}) for i, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("other", "options", "code"),
    [
        ([3.0, 2.0, 1.5], [], 0),
        ([3.0, 2.0, 1.5001], [], 1),
        ([3.0, 2.0, 1.5001], ["--tolerance", "1e-3"], 0),
        ([3.0, 2.0], [], 1),
    ],
)
def test_losses(tmp_path: Path, other: list[float], options: list[str], code: int) -> None:
    first = _metrics(tmp_path / "a", [3.0, 2.0, 1.5])
    second = _metrics(tmp_path / "b", other)
    words = command(TOOL, ["losses", first, second, "--assert-equal", *options])
    assert run(words, timeout=60).code == code


def test_a_missing_run_is_one_sentence(tmp_path: Path) -> None:
    finished = run(command(TOOL, ["losses", tmp_path / "a", tmp_path / "b"]), timeout=60)
    assert finished.code == 1
    assert finished.stderr.splitlines()[-1].startswith("error: ")
    assert "does not exist" in finished.stderr


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_layouts(tmp_path: Path) -> None:
    """All layouts of one and two processes: every gradient, and recomputation and dispatchers."""
    make_digits(tmp_path / "digits")
    values = tiny_values(tmp_path / "digits", tmp_path / "run")
    values["train"] |= {"global_batch_size": 4, "micro_batch_size": 1}
    config = write_config(tmp_path / "run.yaml", values)
    # Adam divides by |g| + epsilon: with the default, rounding noise of a zero gradient becomes a
    # step as large as any.
    words = ["layouts", config, "optimizer.epsilon=1e-3", "--processes", "2"]
    finished = run(command(TOOL, words), timeout=380)
    verdicts = [line for line in finished.stdout.splitlines() if line[:4] in ("PASS", "FAIL")]
    assert finished.code == 0, "\n".join(verdicts) + finished.stderr[-2000:]
    assert len(verdicts) >= 12 and all(line.startswith("PASS") for line in verdicts)
    for part in ("TP2", "PP2", "EP2", "ETP2", "recompute full", "recompute moe", "alltoall"):
        assert any(part in line for line in verdicts), part
