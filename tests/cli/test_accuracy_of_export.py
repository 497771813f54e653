"""tools/accuracy.py and tools/plot_routing.py with an exported directory."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.exported.model import ExportedModel
from tests.helpers.launch import ROOT
from tests.helpers.tiny_export import ask, picture, write_export
from tests.helpers.user_errors import assert_one_error

QUESTIONS = 5
Program = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def data(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about random pictures; the model's own answers are expected, but for two."""
    folder = tmp_path_factory.mktemp("data")
    model = ExportedModel.load(export, device="cpu")
    lines = []
    for i in range(QUESTIONS):
        text = f"What is {i}?"
        picture(i).save(folder / f"{i}.png")
        (answer,) = model.answer([ask(text, picture(i))], max_new_tokens=5)
        turns = [("human", f"<image>\n{text}"), ("gpt", answer if i < 3 else "other")]
        conversations = [{"from": role, "value": value} for role, value in turns]
        record = {"id": str(i), "image": f"{i}.png", "conversations": conversations}
        lines.append(json.dumps(record | {"kind": "odd" if i % 2 else "even"}) + "\n")
    (folder / "4.png").write_text("no picture")
    (folder / "test.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Calls ``main`` of a tool; exit code, standard output, standard error."""

    def call(tool: str, *arguments: Any) -> tuple[int, str, str]:
        spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        capsys.readouterr()
        code = module.main()
        return code, *capsys.readouterr()

    return call


def _options(data: Path, out: Path) -> list[Any]:
    asked = ["--records", data / "test.jsonl", "--images", data, "--max-new-tokens", 5]
    return [*asked, "--batch-size", 2, "--out", out, "--device", "cpu"]


def test_scores_and_experts(export: Path, data: Path, tmp_path: Path, program: Program) -> None:
    out, routing = tmp_path / "scores.json", tmp_path / "routing.jsonl"
    options = [*_options(data, out), "--routing", routing]
    code, printed, _ = program("accuracy", export, *options)
    assert code == 0
    assert "60.0% correct" in printed and "5 questions" in printed
    assert "1 questions could not be asked" in printed and "4.png" in printed
    scores = json.loads(out.read_text())
    assert scores["accuracy"] == 0.6 and scores["checkpoint"] == str(export)
    assert [o["answer"] == o["expected"] for o in scores["outcomes"]] == [True] * 3 + [False] * 2
    # Blanked pictures are asked, but not counted.
    assert all(o["blanked_answer"] for o in scores["outcomes"][:4])
    records = [json.loads(line) for line in routing.read_text().splitlines()]
    assert [record["samples"] for record in records] == [4, 4]
    # The same command goes on from the answers, and from the counts.
    answers = tmp_path / "scores.json.answers.jsonl"
    kept = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(kept[:4]))
    code, printed, _ = program("accuracy", export, *options)
    assert code == 0 and "holds 4 answers already" in printed
    assert json.loads(out.read_text()) == scores
    assert [json.loads(line)["samples"] for line in routing.read_text().splitlines()] == [4, 4]
    code, printed, _ = program("plot_routing", routing, "--out", tmp_path / "pictures")
    assert code == 0
    assert printed.split() == [
        str(tmp_path / "pictures" / name) for name in ("pathways.png", "groups.png")
    ]


def test_one_expert(export: Path, data: Path, tmp_path: Path, program: Program) -> None:
    out = tmp_path / "scores.json"
    code, _, _ = program("accuracy", export, *_options(data, out), "--expert", "text")
    assert code == 0
    scores = json.loads(out.read_text())
    assert scores["expert"] == "text" and scores["accuracy"] < 0.6
    alone = ExportedModel.load(export, device="cpu", expert="text.0")
    (want,) = alone.answer([ask("What is 1?", picture(1))], max_new_tokens=5)
    assert scores["outcomes"][1]["answer"] == want
    # Answers of another expert are not gone on from.
    code, printed, _ = program("accuracy", export, *_options(data, out), "--expert", "vision")
    assert code == 0 and "answers already" not in printed


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--expert", "vision.7"], ("vision.7", "vision.0")),
        (["--expert", "text", "--routing", "a"], ("--routing", "--expert")),
        (["--device", "quantum"], ("quantum",)),
        (["parallel.expert=2"], ("parallel.expert=2", "export")),
    ],
)
def test_refusals(
    options: list[str],
    parts: tuple[str, ...],
    export: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: Program,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = program("accuracy", export, *_options(data, tmp_path / "out.json"), *options)
    assert code == 1
    assert_one_error(error, *parts)
    assert not (tmp_path / "out.json").exists()


def test_options_of_exports_alone(
    export: Path, data: Path, tmp_path: Path, program: Program
) -> None:
    checkpoint = export.parent / "checkpoint"
    options = [*_options(data, tmp_path / "out.json")[:-2], "--expert", "text"]
    code, _, error = program("accuracy", checkpoint, *options)
    assert code == 1
    assert_one_error(error, "--expert", checkpoint, "tools/convert.py export")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ("routing.jsonl", "--out")),
        (["parallel.expert=2", "--out", "pictures"], ("parallel.expert=2", "routing.jsonl")),
        (
            ["--records", "a", "--images", "b", "--out", "pictures"],
            ("--records", "routing.jsonl"),
        ),
    ],
)
def test_options_that_a_file_of_counts_does_not_take(
    options: list[str], parts: tuple[str, ...], tmp_path: Path, program: Program
) -> None:
    (tmp_path / "routing.jsonl").touch()
    code, _, error = program("plot_routing", tmp_path / "routing.jsonl", *options)
    assert code == 1
    assert_one_error(error, *parts)
