"""The sets of questions that a run's checkpoints are evaluated on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from moiie_megatron.config.schema import EvaluationConfig, EvaluationSet
from moiie_megatron.evaluation.asking import check_images
from moiie_megatron.evaluation.questions import Question, read_questions
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class QuestionSet:
    """Questions with expected answers.

    Attributes:
        name: In logs and files.
        images: Directory that image paths are relative to.
        questions: What to ask.
        digest: Of the file of records, the limit and the longest answer.
    """

    name: str
    images: Path
    questions: tuple[Question, ...]
    digest: str


def read_sets(evaluation: EvaluationConfig) -> list[QuestionSet]:
    """All sets of a run.

    Raises:
        UserError: A file cannot be read, its questions have no answers, or an image directory has
            none of its pictures.
    """
    return [_read(one, evaluation.max_new_tokens) for one in evaluation.sets]


def _read(given: EvaluationSet, max_new_tokens: int) -> QuestionSet:
    questions = read_questions(given.records)[: given.limit]
    if questions[0].expected is None:
        raise UserError(
            f"evaluation.sets: {given.name} has questions without answers ({given.records}): use "
            "records whose last turn is the expected answer."
        )
    images = Path(given.images)
    check_images(questions, images, f"evaluation.sets: images of {given.name}")
    digest = hashlib.sha256(Path(given.records).read_bytes())
    digest.update(f"\0{given.limit}\0{max_new_tokens}".encode())
    return QuestionSet(given.name, images, tuple(questions), digest.hexdigest())
