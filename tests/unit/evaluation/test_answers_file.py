"""Answers are kept as they come, in LLaVA's format, and an evaluation goes on from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiie_megatron.evaluation.answers_file import AnswersFile, check_writable
from moiie_megatron.evaluation.questions import Question
from moiie_megatron.evaluation.score import Outcome
from tests.helpers.user_errors import user_error

QUESTIONS = [Question(name, (), ()) for name in ("a", "b", "c")]
A = Outcome("a", "which", "7", "7", "1", "Which?", ("x.png",))
B = Outcome("b", "all", None, "", "", "\u00e9\u2028", (), "no image")


@pytest.fixture
def file(tmp_path: Path) -> AnswersFile:
    return AnswersFile(tmp_path / "new" / "answers.jsonl", "step_2", "1234")


def test_lines_have_llavas_keys(file: AnswersFile) -> None:
    file.append([A])
    line = json.loads(file.path.read_text())
    assert line["question_id"] == "a" and line["prompt"] == "Which?" and line["text"] == "7"
    assert line["model_id"] == "step_2" and line["answer_id"] == "1234-a"
    assert line["metadata"]["images"] == ["x.png"]


def test_outcomes_come_back(file: AnswersFile) -> None:
    assert file.read(QUESTIONS) == []
    file.append([A])
    file.append([B])
    assert file.read(QUESTIONS) == [A, B]


def test_a_line_that_a_kill_left_incomplete_is_cut_off(file: AnswersFile) -> None:
    file.append([A, B])
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-9])
    assert file.read(QUESTIONS) == [A]
    file.append([B])
    assert file.path.read_bytes() == whole


def test_answers_of_another_evaluation_are_refused(file: AnswersFile) -> None:
    file.append([A])
    with user_error(file.path, "line 1", "not of this evaluation"):
        AnswersFile(file.path, "step_2", "5678").read(QUESTIONS)
    with user_error(file.path, "answers to other questions"):
        file.read(QUESTIONS[1:])
    file.path.write_text("not JSON\n")
    with user_error(file.path, "line 1"):
        file.read(QUESTIONS)


def test_a_full_disk_is_one_sentence(file: AnswersFile) -> None:
    file.path = Path("/dev/full")
    with user_error("/dev/full", "No space left", "goes on from the answers so far"):
        file.append([A])


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with user_error("file/scores.json", "cannot be written"):
        check_writable(tmp_path / "file" / "scores.json")
    with user_error(tmp_path, "cannot be written"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "scores.json")
    assert not (tmp_path / "new" / "scores.json").exists()
    (tmp_path / "old").write_text("kept")
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
