"""Ask an exported model the questions of a set; one that cannot be asked costs only itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.record import PLACEHOLDER
from moiie_megatron.evaluation.questions import Question
from moiie_megatron.evaluation.score import Outcome
from moiie_megatron.exported.model import ExportedModel
from moiie_megatron.utils.errors import UserError


def ask_export(
    model: ExportedModel,
    questions: Sequence[Question],
    images: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[list[Outcome]]:
    """Answer the questions by greedy decoding.

    Args:
        model: An export.
        questions: What to ask.
        images: The directory that image paths are relative to.
        batch_size: Questions per forward pass.
        max_new_tokens: Longest answer, in tokens.

    Yields:
        The outcomes of each batch, without answers on blanked images.  A question whose images
        cannot be read, or whose prompt is too long or does not fit the template, has an ``error``.
    """
    processor = model.processor
    mean = tuple(processor.image_processor.image_mean)
    loader = ImageLoader(images, processor.image_size, processor.image_mode, mean)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        outcomes = [_unanswered(question) for question in batch]
        prompts = {}
        for i, question in enumerate(batch):
            try:
                prompts[i] = model.encode(
                    _messages(question, processor.image_token),
                    images=[loader.locate(path) for path in question.images],
                    max_new_tokens=max_new_tokens,
                )
            except UserError as error:
                outcomes[i] = replace(outcomes[i], error=str(error))
        answers = model.generate(list(prompts.values()), max_new_tokens=max_new_tokens)
        for i, ids in zip(prompts, answers, strict=True):
            outcomes[i] = replace(outcomes[i], answer=model.decode(ids))
        yield outcomes


def _messages(question: Question, image_token: str) -> list[dict[str, Any]]:
    return [
        {"role": turn.role, "content": turn.text.replace(PLACEHOLDER, image_token)}
        for turn in question.turns
    ]


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
