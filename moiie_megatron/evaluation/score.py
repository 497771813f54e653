"""Exact-match accuracy on LLaVA questions, with the images and with the images blanked.

The accuracy on blanked images measures what the text alone gives away: a model that ignores its
images has the same accuracy on both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.llava import Record, RecordFile
from moiie_megatron.evaluation.generate import Generator, Prompt
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.text import same_answer


@dataclass(frozen=True)
class Outcome:
    """One question with the expected answer and the model's two answers.

    Attributes:
        id: Of the record.
        kind: Group that the question is counted in.
        expected: The record's answer.
        answer: The model's answer.
        blanked_answer: The model's answer with every image blanked.
        question: The last turn of the user.
        images: The image paths in the record.
    """

    id: str
    kind: str
    expected: str
    answer: str
    blanked_answer: str
    question: str = ""
    images: tuple[str, ...] = ()

    @property
    def correct(self) -> bool:
        return same_answer(self.answer, self.expected)

    @property
    def blanked_correct(self) -> bool:
        return same_answer(self.blanked_answer, self.expected)


@dataclass(frozen=True)
class Score:
    """The outcomes of all questions; accuracies are fractions (0..1)."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        return sum(o.correct for o in self.outcomes) / len(self.outcomes)

    @property
    def blanked_accuracy(self) -> float:
        return sum(o.blanked_correct for o in self.outcomes) / len(self.outcomes)

    def by_kind(self) -> dict[str, Score]:
        """The score of each kind of question."""
        groups: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in self.outcomes:
            groups[outcome.kind].append(outcome)
        return {kind: Score(tuple(groups[kind])) for kind in sorted(groups)}

    def summary(self) -> dict[str, float | int]:
        """Number of questions, and the two accuracies."""
        return {
            "questions": len(self.outcomes),
            "accuracy": self.accuracy,
            "blanked_accuracy": self.blanked_accuracy,
        }

    def to_json(self) -> dict[str, Any]:
        """``summary()`` of all questions and ``by_kind``, and all ``outcomes``."""
        return {
            **self.summary(),
            "by_kind": {kind: part.summary() for kind, part in self.by_kind().items()},
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


@dataclass(frozen=True)
class TestQuestion:
    """A record with the kind that groups it; ``record``'s last turn is the expected answer."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    record: Record
    kind: str


def read_questions(path: str | Path) -> list[TestQuestion]:
    """The questions of a LLaVA record file; the optional key ``kind`` groups them.

    Raises:
        UserError: The file cannot be read, is empty, or holds a record without an answer.
    """
    file = RecordFile(path)
    questions = []
    for i in range(len(file)):
        record = file[i]
        if record.turns[-1].role != "assistant":
            raise UserError(f"{path}[{i}]: the last turn must be the expected answer.")
        questions.append(TestQuestion(record, str(file.value(i).get("kind", "all"))))
    return questions


def score(
    generator: Generator,
    questions: Sequence[TestQuestion],
    images: str | Path,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    show_progress: bool = False,
) -> Score:
    """Answer every question twice: with its images, and with its images blanked.

    Every rank calls this with the same questions.

    Args:
        generator: The model.
        questions: What to ask; at least one.
        images: The directory that image paths are relative to.
        batch_size: Questions per forward pass.
        max_new_tokens: Longest answer, in tokens.
        show_progress: Show a progress bar on standard output.

    Raises:
        UserError: An image or a conversation cannot be used; the message names the record.
    """
    if not questions:
        raise UserError("There are no questions to score.")
    loader = generator.image_loader(images)
    outcomes: list[Outcome] = []
    starts = range(0, len(questions), batch_size)
    for start in track(starts, description="answering", disable=not show_progress):
        batch = questions[start : start + batch_size]
        prompts = [_prompt(generator, loader, q.record) for q in batch]
        answers = generator.answer(prompts, max_new_tokens)
        blanked = generator.answer([generator.blanked(p) for p in prompts], max_new_tokens)
        outcomes += [
            Outcome(
                q.record.id,
                q.kind,
                expected=q.record.turns[-1].text,
                answer=answer,
                blanked_answer=blank,
                question=q.record.turns[-2].text if len(q.record.turns) > 1 else "",
                images=q.record.images,
            )
            for q, answer, blank in zip(batch, answers, blanked, strict=True)
        ]
    return Score(tuple(outcomes))


def _prompt(generator: Generator, loader: ImageLoader, record: Record) -> Prompt:
    try:
        return generator.prompt(record.turns[:-1], [loader.load(path) for path in record.images])
    except UserError as error:
        raise UserError(f"Question {record.id}: {error}") from error
