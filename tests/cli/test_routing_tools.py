"""tools/plot_routing.py and tools/report.py on a tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.launch import TRAIN, command, run
from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import tiny_values, write_config
from tests.helpers.user_errors import assert_user_error

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PLOT, REPORT = "tools/plot_routing.py", "tools/report.py"
SAMPLES = 5  # two ranks read two each, then one reads one and the other has none


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of three steps; its folder also has a dense one."""

    def make(folder: Path) -> None:
        files = []
        for name, stage in (("dense", "dense"), ("run", "joint")):
            values = tiny_values(digits, folder / name, stage)
            values["train"] |= {"steps": 3, "global_batch_size": 4}
            values["log"] = {"routing_interval": 2}
            files.append(write_config(folder / f"{name}.yaml", values))
        run(command(TRAIN, files), timeout=120).check()

    return made_once(session_folder(tmp_path_factory) / "routing_tools", make)


def loads(folder: Path) -> Any:
    """Load by layer and modality of a measured checkpoint."""
    (line,) = (folder / "routing.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["samples"], record["skipped_samples"]) == (SAMPLES, 0)
    assert record["checkpoint"].endswith("step_0000003")
    return {
        (number, modality): layer[modality]["load"]
        for number, layer in record["layers"].items()
        for modality in ("vision", "text")
    }


def test_a_run_is_drawn_from_its_log(trained: Path) -> None:
    finished = run(command(PLOT, [trained / "run"]), timeout=60).check()
    pictures = [Path(line) for line in finished.stdout.splitlines()]
    names = ["pathways.png", "groups.png", "load_map.png"]
    assert pictures == [trained / "run" / "routing" / name for name in names]
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) > 300


def test_a_checkpoint_is_measured_alike_on_one_and_two_ranks(
    trained: Path, digits: Path, tmp_path: Path
) -> None:
    words: list[str | Path] = [trained / "run" / "checkpoints" / "step_0000003"]
    words += ["train.micro_batch_size=2", "--samples", str(SAMPLES)]
    # The checkpoint's own data, and the same named anew.
    run(command(PLOT, [*words, "--out", tmp_path / "one"]), timeout=120).check()
    records = ["--records", digits / "data" / "train.jsonl", "--images", digits / "data" / "images"]
    two = [*words, *records, "parallel.expert=2", "--out", tmp_path / "two"]
    run(command(PLOT, two, processes=2), timeout=120).check()
    assert loads(tmp_path / "one") == loads(tmp_path / "two")
    assert sum(map(sum, loads(tmp_path / "one").values())) > 500
    files = {"routing.jsonl", "pathways.png", "groups.png"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == files


@pytest.mark.parametrize(
    ("target", "options", "parts"),
    [
        ("run", ["--records", "a.jsonl"], ("--records", "--images")),
        ("run", ["--records", "a.jsonl", "--images", "."], ("--records", "--out")),
        ("run", ["--last", "0"], ("--last", 0)),
        ("dense", ["--last", "5"], ("routing.jsonl", "no routing records")),
        ("nothing", ["--out", "unused"], ("nothing", "does not exist")),
        (
            "run",
            ["--records", "a.jsonl", "--images", ".", "--out", "RUN"],
            ("--out", "routing.jsonl", "replaced"),
        ),
    ],
)
def test_plot_refuses(
    target: str, options: list[str], parts: tuple[object, ...], trained: Path
) -> None:
    words = [str(trained / target) if word == "RUN" else word for word in options]
    assert_user_error(run(command(PLOT, [trained / target, *words]), timeout=60), *parts)


def test_report(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "page" / "report.html"
    words = [trained / "dense", trained / "run", "--out", out]
    finished = run(command(REPORT, words), timeout=60).check()
    assert finished.stdout.strip() == str(out)
    page = out.read_text()
    assert "<h1>dense / run</h1>" in page and 'id="routing"' in page
    assert page.count("data:image/svg+xml") == 5
    assert_user_error(run(command(REPORT, [tmp_path]), timeout=60), tmp_path, "config.yaml")
