"""The model is asked with the images and with them blanked; what cannot be asked costs itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moiie_megatron.data.records.record import Turn
from moiie_megatron.evaluation.ask import ask
from moiie_megatron.evaluation.asking import check_images
from moiie_megatron.evaluation.questions import Question, read_questions
from moiie_megatron.evaluation.score import Outcome, Score
from moiie_megatron.generation.generator import Generator
from moiie_megatron.generation.prompt import Prompt
from tests.helpers.user_errors import user_error


def outcomes(
    generator: Generator, questions: Sequence[Question], images: Path, **options: int
) -> list[Outcome]:
    return [outcome for batch in ask(generator, questions, images, **options) for outcome in batch]


def test_the_model_is_asked(generator: Generator, digits: Path) -> None:
    questions = read_questions(digits / "test.jsonl")
    assert len(questions) == 13 and {q.kind for q in questions} == {"which", "is", "sum"}
    found = outcomes(generator, questions, digits / "images", batch_size=4, max_new_tokens=3)
    assert [o.id for o in found] == [q.id for q in questions]
    loader, question = generator.image_loader(digits / "images"), questions[5]
    prompt = generator.prompt(question.turns, [loader.load(question.images[0])])
    assert found[5].answer == generator.answer([prompt], 3)[0]
    assert found[5].blanked_answer == generator.answer([generator.blanked(prompt)], 3)[0]
    assert found[5].expected == question.expected


def test_a_model_that_reads_the_image(
    generator: Generator, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two accuracies differ exactly where answers depend on pixels."""
    questions = [q for q in read_questions(digits / "test.jsonl") if q.kind == "which"]
    answers = iter([q.expected for q in questions])

    def reads(prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return [str(next(answers)) if p.images.float().std() > 1 else "none" for p in prompts]

    monkeypatch.setattr(generator, "answer", reads)
    result = Score(tuple(outcomes(generator, questions, digits / "images", batch_size=2)))
    assert (result.accuracy, result.blanked_accuracy) == (1.0, 0.0)


def test_without_an_expected_answer_nothing_is_blanked(
    generator: Generator, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counts(prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        asked.append(len(prompts))
        return ["x" for _ in prompts]

    monkeypatch.setattr(generator, "answer", counts)
    questions = [replace(q, expected=None) for q in read_questions(digits / "test.jsonl")[:2]]
    found = outcomes(generator, questions, digits / "images")
    assert asked == [2, 0] and [(o.answer, o.blanked_answer) for o in found] == [("x", "")] * 2


def test_what_cannot_be_asked_has_an_error(generator: Generator, digits: Path) -> None:
    """A missing image, a prompt beyond the model's positions; the others have their answers."""
    good, other = read_questions(digits / "test.jsonl")[:2]
    missing = replace(good, id="missing", images=("test/none.png",))
    long = Question("long", (), (Turn("user", "7 " * 3000),), expected="7")
    mixed = outcomes(generator, [missing, good, long, other], digits / "images", max_new_tokens=3)
    alone = outcomes(generator, [good, other], digits / "images", max_new_tokens=3)
    assert [mixed[1], mixed[3]] == alone and not any(o.error for o in alone)
    assert "test/none.png" in mixed[0].error and "max_position_embeddings" in mixed[2].error
    assert [o.answer for o in (mixed[0], mixed[2])] == ["", ""]


def test_a_directory_without_any_of_the_images(digits: Path) -> None:
    questions = read_questions(digits / "test.jsonl")
    check_images(questions, digits / "images")
    with user_error("--images is", "has none of the", "test/00000.png"):
        check_images(questions, digits / "images" / "train")
