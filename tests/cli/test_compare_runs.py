"""The comparison tool: layouts of one step, and the losses of two runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import command, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import tiny_values, write_config
from tests.helpers.user_errors import assert_user_error

TOOL = "tools/compare_runs.py"


def _metrics(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": i + 1, "lm_loss": x}) for i, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("other", "options", "code"),
    [
        ([3.0, 2.0, 1.5], [], 0),
        ([3.0, 2.0, 1.5001], [], 1),
        ([3.0, 2.0, 1.5001], ["--tolerance", "1e-3"], 0),
        ([3.0, 2.0], [], 1),
        ([3.0, 2.0, float("nan")], ["--tolerance", "1e9"], 1),
    ],
)
def test_losses(tmp_path: Path, other: list[float], options: list[str], code: int) -> None:
    first = _metrics(tmp_path / "a", [3.0, 2.0, 1.5])
    second = _metrics(tmp_path / "b", other)
    words = command(TOOL, ["losses", first, second, "--assert-equal", *options])
    assert run(words, timeout=60).code == code


def test_equal_losses_that_are_not_finite(tmp_path: Path) -> None:
    losses = [3.0, float("nan"), float("inf")]
    runs = [_metrics(tmp_path / name, losses) for name in ("a", "b")]
    assert run(command(TOOL, ["losses", *runs, "--assert-equal"]), timeout=60).code == 0


def test_losses_of_validations(tmp_path: Path) -> None:
    part = {"samples": 1, "label_tokens": 2, "image_fraction": 0.5}
    runs = []
    for name, loss in (("a", 2.0), ("b", 2.5)):
        runs.append(_metrics(tmp_path / name, [3.0, 2.0]))
        line = {"step": 2, "loss": loss, **part, "sources": {}, "image_counts": {}}
        (runs[-1] / "validation.jsonl").write_text(json.dumps(line) + "\n")
    finished = run(command(TOOL, ["losses", *runs, "--assert-equal"]), timeout=60)
    assert finished.code == 1
    assert "validation of step 2, all samples: 2.000000 and 2.500000" in finished.stdout


def test_nothing_to_compare(tmp_path: Path) -> None:
    runs = [_metrics(tmp_path / name, []) for name in ("a", "b")]
    assert run(command(TOOL, ["losses", *runs, "--assert-equal"]), timeout=60).code == 1


def test_a_missing_run_is_one_sentence(tmp_path: Path) -> None:
    finished = run(command(TOOL, ["losses", tmp_path / "a", tmp_path / "b"]), timeout=60)
    assert_user_error(finished, tmp_path / "a", "does not exist")


def test_no_processes_are_one_sentence(tmp_path: Path) -> None:
    finished = run(command(TOOL, ["layouts", tmp_path / "x.yaml", "--processes", "0"]), timeout=60)
    assert_user_error(finished, "--processes", 0)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[str]:
    """The whole table up to eight processes."""

    def make(folder: Path) -> None:
        values = tiny_values(digits, folder / "run")
        values["train"] |= {"global_batch_size": 8, "micro_batch_size": 1}
        values["data"]["padding"] = "sequence_length"  # allgather wants equal ranks
        config = write_config(folder / "run.yaml", values)
        words = ["layouts", config, "--processes", "8", f"output={folder / 'other'}"]
        finished = run(command(TOOL, words), timeout=900)
        (folder / "table").write_text(finished.stdout)
        finished.check()

    folder = made_once(session_folder(tmp_path_factory) / "layouts", make)
    lines = (folder / "table").read_text().splitlines()
    return [line for line in lines if line[:4] in ("PASS", "FAIL")]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(960)
@pytest.mark.parametrize("recompute", ["off", "full", "block", "moe"])
@pytest.mark.parametrize("dispatcher", ["moiie", "alltoall", "allgather"])
def test_every_dispatcher_with_every_recompute(
    table: list[str], dispatcher: str, recompute: str
) -> None:
    lines = [line for line in table if f"recompute {recompute} {dispatcher}:" in line]
    for layout in ("TP1 PP1 EP2 ETP1 DP2", "TP1 PP2 EP2 ETP1 DP2", "TP2 PP1 EP2 ETP1 DP2"):
        found = [line for line in lines if line.split("  ", 1)[1].startswith(layout)]
        assert len(found) == 1 and found[0].startswith("PASS"), (layout, found)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(960)
def test_every_grid(table: list[str]) -> None:
    """Which degrees are in the table, so that none can drop out of it unseen."""
    assert all(line.startswith("PASS") for line in table)
    grids = {line.split("  ", 1)[1].split(" recompute")[0] for line in table}
    for part in ("TP2", "PP2", "EP2", "EP4", "ETP2", "DP8"):
        assert any(part in grid.split() for grid in grids), part
    assert {"TP2 PP2 EP2 ETP2 DP2", "TP2 PP2 EP4 ETP1 DP2"} <= grids
    assert {"TP1 PP2 VPP2 EP1 ETP1 DP1", "TP1 PP2 VPP2 EP2 ETP1 DP2"} <= grids
    for variant in ("vanilla", "modality"):
        assert sum(f" {variant}:" in line for line in table) == 4, variant


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_that_would_hang_fail(tmp_path: Path, digits: Path) -> None:
    """Numbers are the same over Gloo; the record of the collectives is not."""
    config = write_config(tmp_path / "run.yaml", tiny_values(digits, tmp_path / "run"))
    layout = {"expert": 2, "data": 2}
    job = {"config": str(config), "overrides": [], "layouts": [layout], "tolerance": 1e-3}
    job |= {"references": str(tmp_path), "verdicts": str(tmp_path / "verdicts")}
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job))
    hook = "tests.distributed.hooks:gather_another_dtype"
    finished = run(command(TOOL, ["worker", file], 2, hook=hook), timeout=200).check()
    assert (tmp_path / "verdicts").read_text() == "FAIL\n"
    assert "do not fit together: the dtype differs: rank 0 at event" in finished.stdout
