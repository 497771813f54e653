"""The outcomes of an evaluation, and exact-match accuracy with the images and with them blanked.

The accuracy on blanked images measures what the text alone gives away: a model that ignores its
images has the same accuracy on both.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from moiie_megatron.utils.text import same_answer


@dataclass(frozen=True)
class Outcome:
    """One question with the expected answer and the model's two answers.

    Attributes:
        id: Of the question.
        kind: Group that the question is counted in.
        expected: The expected answer; None if the question has none.
        answer: The model's answer; empty if the question could not be asked.
        blanked_answer: The model's answer with every image blanked; empty without ``expected``.
        question: The last turn of the user.
        images: The image paths of the question.
        error: Why the question could not be asked; it counts as answered wrongly.
    """

    id: str
    kind: str
    expected: str | None
    answer: str
    blanked_answer: str
    question: str = ""
    images: tuple[str, ...] = ()
    error: str = ""

    @property
    def correct(self) -> bool:
        return self._is_expected(self.answer)

    @property
    def blanked_correct(self) -> bool:
        return self._is_expected(self.blanked_answer)

    def _is_expected(self, answer: str) -> bool:
        return not self.error and self.expected is not None and same_answer(answer, self.expected)


@dataclass(frozen=True)
class Score:
    """The outcomes of questions that have expected answers; accuracies are fractions (0..1)."""

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
