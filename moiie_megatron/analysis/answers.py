"""Questions with their images and the model's answers, for the HTML report."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from moiie_megatron.analysis.scores import Outcome, read_scores
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.record import PLACEHOLDER, BadRecord
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.text import same_answer

_SHOWN = 24
_SIDE = 192  # pixels of a thumbnail
_WHITE = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Answer:
    """One question and its answers.

    Attributes:
        question: Its text, without image placeholders.
        expected: The expected answer.
        answer: The model's answer.
        blanked_answer: The model's answer with every image blanked.
        is_correct: Whether ``answer`` is the expected one.
        images: Data URIs of the thumbnails of the images that can be read.
        missing: Why an image is missing; empty if none is.
    """

    question: str
    expected: str
    answer: str
    blanked_answer: str
    is_correct: bool
    images: tuple[str, ...]
    missing: str


@dataclass(frozen=True)
class Answers:
    """The scores of a question file and some of its questions; accuracies are fractions (0..1).

    Attributes:
        questions: Number of questions.
        accuracy: With the images.
        blanked_accuracy: With the images blanked.
        by_kind: Kind of question, number of questions, accuracy, accuracy on blanked images.
        shown: A sample of the questions.
    """

    questions: int
    accuracy: float
    blanked_accuracy: float
    by_kind: tuple[tuple[str, int, float, float], ...]
    shown: tuple[Answer, ...]


def read_answers(path: str | Path) -> Answers:
    """Read a file that ``tools/accuracy.py --out`` wrote; the sample covers the whole file.

    Raises:
        UserError: The file cannot be read, or that tool did not write it.
    """
    scores = read_scores(path)
    kinds = tuple(
        (kind, part.questions, part.accuracy, part.blanked_accuracy)
        for kind, part in scores.by_kind.items()
    )
    shown = tuple(_answer(outcome, scores.images) for outcome in _sample(scores.outcomes, _SHOWN))
    return Answers(scores.questions, scores.accuracy, scores.blanked_accuracy, kinds, shown)


def _sample(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """``count`` outcomes at equal distances: files are often sorted by kind."""
    count = min(count, len(outcomes))
    return [outcomes[number * len(outcomes) // count] for number in range(count)]


def _answer(outcome: Outcome, root: str) -> Answer:
    images, missing = [], ""
    for path in outcome.images:
        try:
            images.append(_thumbnail(root, path))
        except UserError as error:
            missing = error.reason if isinstance(error, BadRecord) else str(error)
    return Answer(
        question=outcome.question.replace(PLACEHOLDER, "").strip(),
        expected=outcome.expected,
        answer=outcome.answer,
        blanked_answer=outcome.blanked_answer,
        is_correct=same_answer(outcome.answer, outcome.expected),
        images=tuple(images),
        missing=missing,
    )


def _thumbnail(root: str, path: str) -> str:
    """A small PNG of the image on a white square, as a data URI.

    Raises:
        UserError: The directory or the image cannot be read.
    """
    loader = ImageLoader(root, _SIDE, "pad", _WHITE)
    image = Image.fromarray(loader.load(path).permute(1, 2, 0).numpy())
    stream = io.BytesIO()
    image.quantize(64).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
