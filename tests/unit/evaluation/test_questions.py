"""Files of questions: LLaVA records, and LLaVA's question files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.data.records.record import Turn
from moiie_megatron.evaluation.questions import Question, read_questions
from tests.helpers.user_errors import user_error

ASKED = {"question_id": 7, "image": "a/b.jpg", "text": "What is it?", "category": "conv"}
WITH_ANSWER = {
    "id": "r",
    "image": "c.jpg",
    "kind": "which",
    "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "7"}],
}


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_records_have_the_answer_in_their_last_turn(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "test.jsonl", WITH_ANSWER))
    turns = (Turn("user", "<image>\nWhich?"),)
    assert question == Question("r", ("c.jpg",), turns, "which", "7")


def test_a_record_that_ends_with_the_question(tmp_path: Path) -> None:
    record = {**WITH_ANSWER, "conversations": WITH_ANSWER["conversations"][:1]}
    (question,) = read_questions(write(tmp_path / "test.jsonl", record))
    assert question.expected is None and question.turns == (Turn("user", "<image>\nWhich?"),)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_question_files_of_llava(tmp_path: Path, suffix: str) -> None:
    """The image comes in front of the text, as LLaVA's model_vqa.py puts it."""
    alone = {"question_id": "8", "text": "1 + 1?"}
    file = write(tmp_path / "questions.jsonl", ASKED, alone)
    if suffix == ".json":
        file = tmp_path / "questions.json"
        file.write_text(json.dumps([ASKED, alone]))
    assert read_questions(file) == [
        Question("7", ("a/b.jpg",), (Turn("user", "<image>\nWhat is it?"),), "conv"),
        Question("8", (), (Turn("user", "1 + 1?"),)),
    ]


def test_a_question_without_text(tmp_path: Path) -> None:
    file = write(tmp_path / "questions.jsonl", ASKED, {"question_id": 8, "text": None})
    with user_error("[1]", "text must be the question", "None"):
        read_questions(file)


def test_answers_for_some_questions_only(tmp_path: Path) -> None:
    with user_error("[1] has no answer", "another for those without"):
        read_questions(write(tmp_path / "a.jsonl", WITH_ANSWER, ASKED))
    with user_error("[1] has an answer"):
        read_questions(write(tmp_path / "b.jsonl", ASKED, WITH_ANSWER))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no records"),
        ("{", "[0]"),
        (json.dumps({"conversations": []}), "conversations"),
    ],
)
def test_bad_question_files(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(text)
    with user_error(file, part):
        read_questions(file)
    with user_error(tmp_path / "none.jsonl"):
        read_questions(tmp_path / "none.jsonl")


def test_line_separators_inside_a_question(tmp_path: Path) -> None:
    """They are no ends of lines in JSON; the converter to JSON lines leaves them as they are."""
    text = "a\u2028b\u0085c"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "d"}]
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")
    (question,) = read_questions(file)
    assert question.turns[0].text == text
