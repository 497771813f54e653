"""Ask a checkpoint questions, with Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moiie_megatron.evaluation.asking import ask_in_batches
from moiie_megatron.evaluation.questions import Question
from moiie_megatron.evaluation.score import Outcome
from moiie_megatron.generation.generator import Generator
from moiie_megatron.generation.prompt import Prompt


def ask(
    generator: Generator,
    questions: Sequence[Question],
    images: str | Path,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> Iterator[list[Outcome]]:
    """``ask_in_batches`` for a checkpoint.

    Every rank calls this with the same questions and reads all batches.

    Args:
        generator: The model.
        questions: What to ask.
        images: The directory that image paths are relative to.
        batch_size: Questions per forward pass.
        max_new_tokens: Longest answer, in tokens.
    """
    return ask_in_batches(
        _Checkpoint(generator, images),
        questions,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )


class _Checkpoint:
    def __init__(self, generator: Generator, images: str | Path) -> None:
        self._generator = generator
        self._loader = generator.image_loader(images)

    def prompt(self, question: Question, max_new_tokens: int) -> Prompt:
        pixels = [self._loader.load(path) for path in question.images]
        prompt = self._generator.prompt(question.turns, pixels)
        self._generator.check_length(prompt, max_new_tokens)
        return prompt

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return self._generator.answer(prompts, max_new_tokens)

    def answer_blanked(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        blanked = [self._generator.blanked(prompt) for prompt in prompts]
        return self._generator.answer(blanked, max_new_tokens)
