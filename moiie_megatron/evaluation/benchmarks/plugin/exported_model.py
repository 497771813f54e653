"""An export as a model of lmms-eval: ``--model moiie --model_args pretrained=EXPORT``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance

from moiie_megatron.evaluation.benchmarks.plugin.chat_model import (
    ChatModel,
    cut_at,
    one_line,
    sampling_settings,
)
from moiie_megatron.evaluation.benchmarks.plugin.kept_answers import Answer
from moiie_megatron.exported.model import ExportedModel, Prompt


class ExportedChat(ChatModel):
    """Answers with transformers, in batches that are padded at the left.

    The model is loaded when the first request is not among the kept answers.

    Args:
        pretrained: Export.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: ``auto`` for that of the files.
        expert: Every MoE layer uses this expert alone (``shared.0``).
        batch_size: See ``ChatModel``.
        answers: See ``ChatModel``.
        max_new_tokens: See ``ChatModel``.
        ignored: What lmms-eval adds for other models.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        expert: str | None = None,
        batch_size: int | str = 1,
        answers: str | None = None,
        max_new_tokens: int | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__(batch_size, answers, max_new_tokens)
        self._load = functools.partial(
            ExportedModel.load,
            str(pretrained),
            device=device or "auto",
            dtype=dtype,
            expert=expert,
        )
        self._loaded: ExportedModel | None = None

    def answer_batch(
        self, requests: Sequence[Instance], settings: Mapping[str, Any]
    ) -> list[Answer]:
        exported = self._exported  # a broken export ends the task
        answers: dict[int, Answer] = {}
        prompts: dict[int, Prompt] = {}
        for i, request in enumerate(requests):
            try:
                messages = self.messages(request).to_hf_messages()
                prompts[i] = exported.encode(messages, max_new_tokens=self.new_tokens(settings))
            except Exception as error:  # a picture, a prompt that is too long: this request alone
                answers[i] = Answer("", one_line(error))
        answers |= self._answers(prompts, settings)
        return [answers[i] for i in range(len(requests))]

    def clean(self) -> None:
        """Free the model before the answers are scored."""
        self._loaded = None
        super().clean()

    @property
    def _exported(self) -> ExportedModel:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _answers(
        self, prompts: Mapping[int, Prompt], settings: Mapping[str, Any]
    ) -> dict[int, Answer]:
        """Together, or one by one if that fails."""
        if not prompts:
            return {}
        try:
            ids = self._exported.generate(
                list(prompts.values()),
                max_new_tokens=self.new_tokens(settings),
                generation=sampling_settings(settings),
            )
        except Exception as error:  # out of memory, for instance
            if len(prompts) == 1:
                return dict.fromkeys(prompts, Answer("", one_line(error)))
            parts = (self._answers({i: prompt}, settings) for i, prompt in prompts.items())
            return {i: answer for part in parts for i, answer in part.items()}
        texts = map(self._exported.decode, ids)
        return {i: Answer(cut_at(t, settings)) for i, t in zip(prompts, texts, strict=True)}
