"""The demo runs from data to report; what it leaves behind can be used."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.launch import ROOT, Finished, environment, python
from tests.helpers.shared import made_once, session_folder
from tests.helpers.user_errors import assert_user_error

PLOTS = ("losses.png", "pathways.png", "groups.png", "load_map.png")

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A tool of this project; output and errors as text."""
    return subprocess.run(
        [python(), *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        result = start("tools/demo.py", "--quick", "--out", str(folder))
        assert result.returncode == 0, result.stdout + result.stderr
        assert "step 4/4" in result.stdout and "checkpoint " in result.stdout

    return made_once(session_folder(tmp_path_factory) / "demo", make)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_report(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    kinds = report["by_kind"]
    assert set(kinds) == {"which", "is", "sum"}
    assert report["questions"] == sum(kind["questions"] for kind in kinds.values()) == 17
    assert 0 <= report["accuracy"] <= 1 and 0 <= report["blanked_accuracy"] <= 1
    assert report["seconds"] > sum(stage["seconds"] for stage in report["stages"].values()) > 0
    assert (Path(report["checkpoint"]) / "run.yaml").is_file()
    lines = metrics(out)
    assert [(r["stage"], r["step"]) for r in lines] == [
        (stage, step) for stage in ("dense", "stage1", "stage2") for step in range(1, 5)
    ]
    for stage, numbers in report["stages"].items():
        losses = [r["lm_loss"] for r in lines if r["stage"] == stage]
        assert (numbers["first_loss"], numbers["last_loss"]) == (losses[0], losses[-1])
        assert numbers["steps"] == 4
    # Stage 1 trains a new connector alone; stage 2 has experts in layers 1 and 3.
    assert {key for key in lines[4] if key.startswith("lr_")} == {"lr_connector"}
    routing = json.loads((out / "stage2" / "routing.jsonl").read_text().splitlines()[-1])
    assert (routing["step"], set(routing["layers"])) == (4, {"1", "3"})


def test_page(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "<h1>dense / stage1 / stage2</h1>" in page
    # Curves, routing, and the pictures of the questions.
    assert page.count("data:image/svg+xml") == 5 and page.count("data:image/png") == 17
    assert "Which digit is at the" in page


@pytest.mark.parametrize("name", PLOTS)
def test_plots(out: Path, name: str) -> None:
    with Image.open(out / name) as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_started_again_trains_nothing(out: Path) -> None:
    before = metrics(out)
    result = start("tools/demo.py", "--quick", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("nothing to do") == 3 and "step 1/" not in result.stdout
    assert metrics(out) == before


def torchrun(*arguments: str) -> Sequence[str]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments)


@pytest.mark.parametrize("layout", ["expert", "tensor"])
def test_two_processes_answer_as_one(out: Path, layout: str, tmp_path: Path) -> None:
    data, file, kept = out / "data", tmp_path / "scores.json", "scores.json.answers.jsonl"
    if layout == "tensor":  # goes on from where one process was killed
        answers = (out / kept).read_bytes().splitlines(keepends=True)
        (tmp_path / kept).write_bytes(b"".join(answers[:6])[:-20])
    result = start(
        *torchrun("tools/accuracy.py", str(out / "stage2"), f"parallel.{layout}=2"),
        *("--records", str(data / "test.jsonl"), "--images", str(data / "images")),
        *("--out", str(file), "--max-new-tokens", "8", "--batch-size", "5"),
    )
    assert result.returncode == 0, result.stderr
    one = json.loads((out / "scores.json").read_text())
    assert json.loads(file.read_text())["outcomes"] == one["outcomes"]
    assert ("holds 5 answers already" in result.stdout) == (layout == "tensor")
    assert (tmp_path / kept).read_bytes() == (out / kept).read_bytes()


def test_questions_without_answers(out: Path, tmp_path: Path) -> None:
    """One of LLaVA's question files, one of whose images is missing."""
    questions = tmp_path / "questions.jsonl"
    name = json.loads((out / "data" / "test.jsonl").read_text().splitlines()[0])["image"]
    asked = [
        {"question_id": 1, "image": name, "text": "Which digit is shown?"},
        {"question_id": 2, "image": "gone.png", "text": "Which digit is shown?"},
    ]
    questions.write_text("".join(json.dumps(one) + "\n" for one in asked))
    arguments = ("--records", str(questions), "--images", str(out / "data" / "images"))
    command = ("tools/accuracy.py", str(out / "stage2"), *arguments, "--max-new-tokens", "4")
    result = start(*command, "--answers", str(tmp_path / "answers.jsonl"))
    assert result.returncode == 0, result.stderr
    assert "2 questions answered" in result.stdout and "gone.png" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["1", "2"]
    assert [bool(line["metadata"]["error"]) for line in lines] == [False, True]
    result = start(*command)
    refused = Finished(result.returncode, result.stdout, result.stderr)
    assert_user_error(refused, "questions without answers", "--answers")


def test_generate_prints_the_answer(out: Path) -> None:
    question = json.loads((out / "data" / "test.jsonl").read_text().splitlines()[0])
    image = str(out / "data" / "images" / question["image"])
    text = question["conversations"][0]["value"]
    result = start(
        *("tools/generate.py", str(out / "stage2"), "--image", image),
        *("--prompt", text, "--max-new-tokens", "8"),
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads((out / "scores.json").read_text())["outcomes"][0]
    assert result.stdout.strip() == outcome["answer"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--image", "nowhere.png"], ("nowhere.png", "does not exist")),
        (["--max-new-tokens", "0"], ("--max-new-tokens", "0", "1 or more")),
        (["parallel.pipeline=2"], ("1 ranks", "parallel.pipeline", "2")),
        (["--records", "prompts.jsonl"], ("--prompt and --records", "exactly one")),
        (["--out", "answers.jsonl"], ("--out", "answers.jsonl", "belongs to --records")),
        (["--top-p", "0"], ("top_p", "0.0", "up to 1")),
    ],
)
def test_generate_refuses(out: Path, arguments: list[str], parts: tuple[str, ...]) -> None:
    result = start("tools/generate.py", str(out / "stage2"), "--prompt", "Hi", *arguments)
    assert_user_error(Finished(result.returncode, result.stdout, result.stderr), *parts)


def test_a_failing_stage_fails_the_demo(tmp_path: Path) -> None:
    (tmp_path / "dense").write_text("in the way of the first stage")
    result = start("tools/demo.py", "--quick", "--out", str(tmp_path))
    assert result.returncode == 1
    assert "tools/train.py" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "report.json").exists()


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "note.txt").write_text("mine")
    result = start("tools/demo.py", "--quick", "--out", str(tmp_path))
    finished = Finished(result.returncode, result.stdout, result.stderr)
    assert_user_error(finished, tmp_path / "data", "exists")
