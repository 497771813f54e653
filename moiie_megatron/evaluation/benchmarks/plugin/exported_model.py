"""An export as a model of lmms-eval: ``--model moiie --model_args pretrained=EXPORT``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from moiie_megatron.exported.routing import RoutingRecorder


class ExportedChat(ChatModel):
    """Answers with transformers, in batches that are padded at the left.

    The model is loaded when the first request is not among the kept answers.

    Args:
        pretrained: Export.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: ``auto`` for that of the files.
        expert: Every MoE layer uses this expert alone (``shared.0``).
        routing: File for the counts of ``RoutingRecorder``, which go on from those in it.
        common: See ``ChatModel``.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        expert: str | None = None,
        routing: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self._load = functools.partial(
            ExportedModel.load,
            str(pretrained),
            device=device or "auto",
            dtype=dtype,
            expert=expert,
        )
        self._loaded: ExportedModel | None = None
        self._routing = routing
        self._recorder: RoutingRecorder | None = None

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
        if self._recorder is not None and self._routing is not None:
            self._recorder.save(self._routing, task=requests[0].args[4])
        return [answers[i] for i in range(len(requests))]

    def clean(self) -> None:
        """Free the model before the answers are scored."""
        self._loaded = self._recorder = None
        super().clean()

    @property
    def _exported(self) -> ExportedModel:
        if self._loaded is None:
            self._loaded = self._load()
            if self._routing is not None:
                self._recorder = RoutingRecorder(self._loaded.model)
                if Path(self._routing).exists():
                    self._recorder.add_saved(self._routing)
                self._recorder.__enter__()  # until the model is freed
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
