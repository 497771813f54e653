"""tools/plan.py on a tiny run: a layout, a search, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.launch import Finished, command, run
from tests.helpers.tiny_run import tiny_values, write_config
from tests.helpers.user_errors import assert_user_error

TOOL = "tools/plan.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another machine: on GPUs, with paths that are not here and a variable."""
    folder = tmp_path_factory.mktemp("plan")
    values: dict[str, Any] = tiny_values(Path("/nowhere"), Path("${OUTPUT}/run"))
    values["train"] |= {"device": "cuda", "precision": "bf16", "global_batch_size": 16}
    return write_config(folder / "tiny.yaml", values)


def plan(config: Path, *words: object) -> Finished:
    return run(command(TOOL, [config, *map(str, words)]), timeout=250)


@pytest.mark.slow
def test_a_search_writes_what_can_be_planned(config: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("plan.json", "plan.png", "run.yaml")}
    done = plan(
        *(
            config,
            "--gpus",
            2,
            "--search",
            "--layouts",
            1,
            "--processes",
            1,
            "train.micro_batch_size=1",
        ),
        *("--json", files["plan.json"], "--picture", files["plan.png"]),
        *("--write", files["run.yaml"], "--routing", "skew=1.2"),
    ).check()
    assert "# Layouts" in done.stdout and "## Not simulated" in done.stdout
    values = json.loads(files["plan.json"].read_text())
    (found,) = values["found"]
    assert found["is_deep"]
    low, high = found["plan"]["time"]["mfu"]
    assert 0 < low < high < 1
    assert found["plan"]["stages"][0]["memory"]["weights"] > 10_000
    written = yaml.safe_load(files["run.yaml"].read_text())
    assert written["parallel"]["tensor"] == found["tensor"]
    assert written["train"]["micro_batch_size"] == found["micro_batch_size"]
    again = plan(config, "--gpus", 2, "--search", "--write", files["run.yaml"])
    assert_user_error(again, "--write", files["run.yaml"])


def test_nothing_fits_has_its_own_exit_code(config: Path) -> None:
    """States that exceed the memory are refused without a simulation."""
    done = plan(config, "--gpus", 1, "--gpu", "0.0001,100,100,10", "--search")
    assert done.code == 3, done.stderr
    assert "No layout fits." in done.stdout and "GiB without the margin" in done.stdout


def test_mistakes_are_told_before_anything_is_simulated(config: Path) -> None:
    done = plan(config, "--gpus", 3, "--routing", "balanced", "train.global_batch_size=16")
    assert_user_error(done, "train.global_batch_size", 16, 3)
