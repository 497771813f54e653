"""Ask an exported model questions, with transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from moiie_megatron.data.encode.images import ImageLoader, read_image
from moiie_megatron.data.records.record import PLACEHOLDER
from moiie_megatron.evaluation.asking import ask_in_batches
from moiie_megatron.evaluation.questions import Question
from moiie_megatron.evaluation.score import Outcome
from moiie_megatron.exported.model import ExportedModel, Prompt
from moiie_megatron.exported.routing import RoutingRecorder


def ask_export(
    model: ExportedModel,
    questions: Sequence[Question],
    images: str | Path,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    with_blanked: bool = True,
    recorder: RoutingRecorder | None = None,
) -> Iterator[list[Outcome]]:
    """``ask_in_batches`` for an export.

    Args:
        model: The model.
        questions: What to ask.
        images: The directory that image paths are relative to.
        batch_size: Questions per forward pass.
        max_new_tokens: Longest answer, in tokens.
        with_blanked: Whether to ask with blanked images, too.
        recorder: Counts the experts of questions with their own images, not with blanked ones.

    Raises:
        UserError: ``images`` is no directory.
    """
    return ask_in_batches(
        _Export(model, images, recorder),
        questions,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        with_blanked=with_blanked,
    )


class _Export:
    def __init__(
        self, model: ExportedModel, images: str | Path, recorder: RoutingRecorder | None
    ) -> None:
        self._model = model
        # Finds the files; the processor of the export resizes.
        self._loader = ImageLoader(images, model.processor.image_size, "square", (0.5, 0.5, 0.5))
        self._recorder = recorder

    def prompt(self, question: Question, max_new_tokens: int) -> Prompt:
        pictures = [read_image(self._loader.locate(path), path) for path in question.images]
        token = self._model.processor.image_token
        messages = [
            {"role": turn.role, "content": turn.text.replace(PLACEHOLDER, token)}
            for turn in question.turns
        ]
        return self._model.encode(messages, images=pictures, max_new_tokens=max_new_tokens)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        with self._recorder or nullcontext():
            return self._texts(prompts, max_new_tokens)

    def answer_blanked(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return self._texts([self._model.blanked(prompt) for prompt in prompts], max_new_tokens)

    def _texts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        ids = self._model.generate(prompts, max_new_tokens=max_new_tokens)
        return [self._model.decode(answer) for answer in ids]
