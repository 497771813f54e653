"""Scores count exact matches, by kind, and show what needs the image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from moiie_megatron.evaluation.generate import Generator, Prompt
from moiie_megatron.evaluation.score import Outcome, Score, read_questions, score
from moiie_megatron.utils.text import same_answer
from tests.helpers.user_errors import user_error


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [(" Yes\n", "yes", True), ("7", "7", True), ("7.", "7", False), ("17", "7", False)],
)
def test_same_answer(answer: str, expected: str, same: bool) -> None:
    assert same_answer(answer, expected) is same


def test_numbers() -> None:
    result = Score(
        (
            Outcome("a", "which", "7", "7", "1"),
            Outcome("b", "which", "3", "4", "1"),
            Outcome("c", "which", "1", "1", "1"),
            Outcome("d", "exists", "yes", "Yes", "no"),
        )
    )
    assert (result.accuracy, result.blanked_accuracy) == (0.75, 0.25)
    kinds = result.by_kind()
    assert list(kinds) == ["exists", "which"]
    assert kinds["which"].accuracy == pytest.approx(2 / 3)
    assert kinds["which"].blanked_accuracy == pytest.approx(1 / 3)
    values = result.to_json()
    assert values["questions"] == 4 and values["by_kind"]["exists"]["accuracy"] == 1.0
    assert values["outcomes"][1]["answer"] == "4"


def test_score_asks_the_model(generator: Generator, digits: Path) -> None:
    questions = read_questions(digits / "test.jsonl")
    assert len(questions) == 13 and {q.kind for q in questions} == {"which", "is", "sum"}
    result = score(generator, questions, digits / "images", batch_size=4, max_new_tokens=3)
    assert [o.id for o in result.outcomes] == [q.record.id for q in questions]
    loader = generator.image_loader(digits / "images")
    record = questions[5].record
    prompt = generator.prompt(record.turns[:-1], [loader.load(record.images[0])])
    assert result.outcomes[5].answer == generator.answer([prompt], 3)[0]
    assert result.outcomes[5].blanked_answer == generator.answer([generator.blanked(prompt)], 3)[0]
    assert result.outcomes[5].expected == record.turns[-1].text


def test_a_model_that_reads_the_image(
    generator: Generator, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two accuracies differ exactly where answers depend on pixels."""
    questions = [q for q in read_questions(digits / "test.jsonl") if q.kind == "which"]
    answers = iter([q.record.turns[-1].text for q in questions])

    def reads(prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return [next(answers) if p.images.float().std() > 1 else "none" for p in prompts]

    monkeypatch.setattr(generator, "answer", reads)
    result = score(generator, questions, digits / "images", batch_size=2)
    assert (result.accuracy, result.blanked_accuracy) == (1.0, 0.0)


def test_missing_image_names_the_question(generator: Generator, digits: Path) -> None:
    questions = read_questions(digits / "test.jsonl")[:1]
    with user_error("test-0-0", "test/00000.png"):
        score(generator, questions, digits / "images" / "train")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no records"),
        ("{", "[0]"),
        (json.dumps({"conversations": [{"from": "human", "value": "a"}]}), "[0]"),
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
    assert question.record.turns[0].text == text


def test_no_questions(generator: Generator, digits: Path) -> None:
    with user_error("questions"):
        score(generator, [], digits / "images")
