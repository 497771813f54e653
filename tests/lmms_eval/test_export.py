"""An export and a server with the same answers have the same scores, which are known by hand."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.exported.model import ExportedModel
from tests.lmms_eval.programs import answers, evaluate, results
from tests.lmms_eval.scripted import SCORES, scripted
from tests.lmms_eval.stub_server import Messages, serving, text_of
from tests.lmms_eval.taught import Lesson, write_taught_export

TASKS = {"POPE": "pope", "DocVQA": "docvqa_val", "MMMU-val": "mmmu_val"}
ROWS = {"POPE": 4, "DocVQA": 3, "MMMU-val": 3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scripted_run(
    eval_python: str, variables: dict[str, str], sets: Path, tmp_path_factory: Any
) -> tuple[str, Path, list[Lesson]]:
    """What the program prints and writes about a scripted server, and what that was asked."""
    out, lessons = tmp_path_factory.mktemp("scripted") / "out", []

    def answer(messages: Messages) -> str:
        lessons.append((messages, scripted(text_of(messages))))
        return lessons[-1][1]

    with serving(answer) as server:
        words = (server.url, "--tasks", ",".join(TASKS), "--data", sets, "--python", eval_python)
        text = evaluate(*words, "--out", out, variables=variables)
        assert server.at_once <= 16
    return text, out, lessons


@pytest.fixture(scope="module")
def export(
    scripted_run: tuple[str, Path, list[Lesson]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny export that has learned the script."""
    return write_taught_export(tmp_path_factory.mktemp("taught"), scripted_run[2])


@pytest.fixture(scope="module")
def exported_run(
    eval_python: str,
    variables: dict[str, str],
    sets: Path,
    export: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """The same through lmms-eval's plugin, in batches, with the choices of experts counted."""
    out = tmp_path_factory.mktemp("exported") / "out"
    words = (export, "--tasks", ",".join(TASKS), "--data", sets, "--python", eval_python)
    options = ("--batch-size", 3, "--routing", "--device", "cpu", "--max-new-tokens", 24)
    return evaluate(*words, *options, "--out", out, variables=variables), out


def check_scores(out: Path) -> None:
    found = results(out)
    assert {name: found[name]["score"] for name in TASKS} == {n: SCORES[n] for n in TASKS}
    assert {name: found[name]["requests"] for name in TASKS} == ROWS
    assert all(found[name]["errors"] == 0 for name in TASKS)


def test_a_server(scripted_run: tuple[str, Path, list[Lesson]], sets: Path) -> None:
    text, out, lessons = scripted_run
    check_scores(out)
    assert f"POPE      data in {sets}/lmms-lab-encoder/POPE" in text
    assert "| POPE | pope_f1_score | 50.0 | 4 of 4 |" in text
    assert (out / "results.md").read_text() in text
    assert len(lessons) == sum(ROWS.values())


def test_several_pictures_stand_where_the_question_has_them(
    scripted_run: tuple[str, Path, list[Lesson]],
) -> None:
    (messages,) = (m for m, _ in scripted_run[2] if "less than" in text_of(m))
    kinds = [part["type"] for part in messages[-1]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]


def test_an_export(exported_run: tuple[str, Path]) -> None:
    check_scores(exported_run[1])
    assert "POPE: scored, pope_f1_score 50.0, 4 requests, 0 errors" in exported_run[0]


def test_routing_of_each_benchmark(exported_run: tuple[str, Path]) -> None:
    for name, task in TASKS.items():
        directory = exported_run[1] / task
        records = [json.loads(x) for x in (directory / "routing.jsonl").read_text().splitlines()]
        assert [record["phase"] for record in records] == ["prompt", "answer"]
        assert {record["task"] for record in records} == {task}
        assert records[0]["samples"] == ROWS[name]
        # Four tokens of each picture; MMMU's three questions have four pictures.
        pictures = 4 if name == "MMMU-val" else ROWS[name]
        assert records[0]["layers"]["1"]["vision"]["tokens"] == 4 * pictures
        assert (directory / "pathways.png").stat().st_size > 1000


def test_the_same_model_behind_a_server(
    eval_python: str,
    variables: dict[str, str],
    sets: Path,
    export: Path,
    exported_run: tuple[str, Path],
    tmp_path: Path,
) -> None:
    model, lock = ExportedModel.load(export, device="cpu"), threading.Lock()

    def answer(messages: Messages) -> str:
        with lock:
            return model.answer([messages], max_new_tokens=24)[0]

    with serving(answer) as server:
        words = (server.url, "--tasks", "POPE,MMMU-val", "--data", sets, "--python", eval_python)
        evaluate(*words, "--max-new-tokens", 24, "--out", tmp_path / "out", variables=variables)
    for task in ("pope", "mmmu_val"):
        texts = [[a["text"] for a in answers(o, task)] for o in (tmp_path / "out", exported_run[1])]
        assert texts[0] == texts[1]
        assert len(texts[0]) == ROWS["POPE" if task == "pope" else "MMMU-val"]


def test_one_expert_alone(
    eval_python: str,
    variables: dict[str, str],
    sets: Path,
    export: Path,
    scripted_run: tuple[str, Path, list[Lesson]],
    tmp_path: Path,
) -> None:
    lessons = scripted_run[2]
    for expert in ("vision.0", "shared.0", "shared.1", "text.0"):
        alone = ExportedModel.load(export, device="cpu", expert=expert)
        expected = [alone.answer([messages], max_new_tokens=24)[0] for messages, _ in lessons]
        if expected != [answer for _, answer in lessons]:  # else it would prove nothing
            break
    else:
        pytest.fail("every expert alone answers like all of them")
    words = (export, "--tasks", ",".join(TASKS), "--data", sets, "--python", eval_python)
    options = ("--expert", expert, "--device", "cpu", "--max-new-tokens", 24)
    text = evaluate(*words, *options, "--out", tmp_path / "out", variables=variables)
    assert f"{export}, expert {expert} alone: {len(TASKS)} benchmarks" in text
    # The server was asked in no certain order.
    texts = [a["text"] for task in TASKS.values() for a in answers(tmp_path / "out", task)]
    assert sorted(texts) == sorted(expected)
