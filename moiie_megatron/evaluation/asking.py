"""Put questions to a model in batches; a question that cannot be asked costs only itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from moiie_megatron.evaluation.questions import Question
from moiie_megatron.evaluation.score import Outcome
from moiie_megatron.utils.errors import UserError

P = TypeVar("P")


class Answering(Protocol[P]):
    """A model that answers questions about images; ``P`` is its prompt."""

    def prompt(self, question: Question, max_new_tokens: int) -> P:
        """Encode a question; ``UserError`` if it cannot be asked."""

    def answer(self, prompts: Sequence[P], max_new_tokens: int) -> list[str]:
        """One answer for each prompt."""

    def answer_blanked(self, prompts: Sequence[P], max_new_tokens: int) -> list[str]:
        """The answers with every image blanked."""


def check_images(questions: Sequence[Question], images: str | Path, name: str = "--images") -> None:
    """Refuse a directory that has none of the images: it is the wrong one.

    Args:
        questions: With paths of images.
        images: The directory.
        name: Of the option, for the message.

    Raises:
        UserError: No image of any question is there.
    """
    paths = [path for question in questions for path in question.images]
    if paths and not any(Path(images, path).exists() for path in paths):
        raise UserError(
            f"{name} is {images}, which has none of the {len(paths)} images of the questions "
            f"(the first is {paths[0]}): name the directory that image paths are relative to."
        )


def ask_in_batches(
    model: Answering[P],
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    with_blanked: bool = True,
) -> Iterator[list[Outcome]]:
    """Answer the questions, those with an expected answer twice: once with the images blanked.

    Args:
        model: Answers.
        questions: What to ask.
        batch_size: Questions per forward pass.
        max_new_tokens: Longest answer, in tokens.
        with_blanked: Whether to ask with blanked images, too.

    Yields:
        The outcomes of each batch.  A question whose images cannot be read, or whose prompt is too
        long or does not fit the template, has an ``error`` instead of answers.
    """
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        outcomes = [_unanswered(question) for question in batch]
        prompts: dict[int, P] = {}
        for i, question in enumerate(batch):
            try:
                prompts[i] = model.prompt(question, max_new_tokens)
            except UserError as error:
                outcomes[i] = replace(outcomes[i], error=str(error))
        answers = model.answer(list(prompts.values()), max_new_tokens)
        for i, answer in zip(prompts, answers, strict=True):
            outcomes[i] = replace(outcomes[i], answer=answer)
        again = prompts if with_blanked else {}
        expected = {i: p for i, p in again.items() if batch[i].expected is not None}
        blanked = model.answer_blanked(list(expected.values()), max_new_tokens)
        for i, answer in zip(expected, blanked, strict=True):
            outcomes[i] = replace(outcomes[i], blanked_answer=answer)
        yield outcomes


def _unanswered(question: Question) -> Outcome:
    return Outcome(
        question.id,
        question.kind,
        expected=question.expected,
        answer="",
        blanked_answer="",
        question=question.turns[-1].text if question.turns else "",
        images=question.images,
    )
