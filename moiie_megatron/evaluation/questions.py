"""Questions about images, with or without expected answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.records.parse import parse_record
from moiie_megatron.data.records.record import BadRecord, Record, Turn
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Question:
    """What to ask, and what the answer should be.

    Attributes:
        id: Of the question.
        images: Image paths, in the order of their placeholders.
        turns: The conversation up to the question.
        kind: Group that the question is counted in.
        expected: The answer; None if the file has none.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    kind: str = "all"
    expected: str | None = None


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file of LLaVA records, or of one of LLaVA's question files.

    In a record the last turn of the assistant is the expected answer, and the optional key
    ``kind`` groups the questions.  An entry of a question file (``llava_test_*.jsonl``) has
    ``question_id``, ``text`` and ``image``, and no answer; its optional ``category`` is the kind.

    Raises:
        UserError: The file cannot be read, is empty, holds an entry that is neither, or only some
            of its questions have an answer.
    """
    file = RecordFile(path)
    questions = [_question(file, i) for i in range(len(file))]
    for i, question in enumerate(questions):
        if (question.expected is None) != (questions[0].expected is None):
            has = "has no answer" if question.expected is None else "has an answer"
            raise UserError(
                f"{path}[{i}] {has}, unlike the question before it: use one file for questions "
                "with answers and another for those without."
            )
    return questions


def _question(file: RecordFile, i: int) -> Question:
    value = file.value(i)
    if isinstance(value, dict) and "question_id" in value and "conversations" not in value:
        try:
            return _of_question_file(value)
        except BadRecord as error:
            raise BadRecord(error.reason, str(file.path), i) from error
    record: Record = file[i]
    *turns, last = record.turns
    if last.role != "assistant":
        turns, answer = [*record.turns], None
    else:
        answer = last.text
    return Question(record.id, record.images, tuple(turns), str(value.get("kind", "all")), answer)


def _of_question_file(value: dict[str, Any]) -> Question:
    text = value.get("text")
    if not isinstance(text, str):
        raise BadRecord(f"text must be the question, not {str(text)[:80]}")
    record = parse_record(
        {
            "id": str(value["question_id"]),
            "image": value.get("image"),
            "conversations": [{"from": "human", "value": text}],
        }
    )
    return Question(record.id, record.images, record.turns, str(value.get("category", "all")))
