"""A model behind an OpenAI-compatible server: ``--model moiie_server --model_args base_url=URL``.

lmms-eval's ``async_openai`` asks; this keeps its answers and tells failures from answers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmms_eval.api.instance import Instance
from lmms_eval.models.chat.async_openai import AsyncOpenAIChat

from moiie_megatron.evaluation.benchmarks.plugin.chat_model import ChatModel, cut_at, one_line
from moiie_megatron.evaluation.benchmarks.plugin.kept_answers import Answer

KEY_VARIABLE: Final = "MOIIE_SERVER_API_KEY"  # OPENAI_API_KEY may be the judge's
_ROUNDS: Final = 4  # of requests at a time before answers are written
_FAILED: Final = "[LMMS_EVAL_REQUEST_FAILED"  # how async_openai returns a failure


class ServerChat(ChatModel):
    """Asks a server, several requests at a time.

    Args:
        base_url: ``http://HOST:PORT/v1``.
        model: The name that the server gives the model.
        timeout: Seconds for one request.
        max_retries: Attempts for one request.
        batch_size: Requests at a time.
        common: See ``ChatModel``.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        timeout: int = 600,
        max_retries: int = 3,
        batch_size: int | str = 16,
        **common: Any,
    ) -> None:
        super().__init__(_ROUNDS * int(batch_size), **common)
        self._options = {
            "model": str(model),
            "base_url": base_url,
            "api_key": os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY") or "none",
            "timeout": int(timeout),
            "max_retries": int(max_retries),
            "num_cpus": int(batch_size),  # what async_openai calls its requests at a time
            "prefix_aware_queue": False,
            "work_dir": os.curdir,  # for tools, which are not used
        }

    def answer_batch(
        self, requests: Sequence[Instance], settings: Mapping[str, Any]
    ) -> list[Answer]:
        answers: dict[int, Answer] = {}
        asked: dict[int, Instance] = {}
        for i, request in enumerate(requests):
            try:
                self.messages(request)
                asked[i] = request
            except Exception as error:  # a picture that cannot be read
                answers[i] = Answer("", one_line(error))
        for request in asked.values():
            request.args[2]["max_new_tokens"] = self.new_tokens(settings)
        # A new one each time: its connections belong to an event loop that it ends itself.
        client = AsyncOpenAIChat(**self._options)
        client.task_dict = self.task_dict
        results = client.generate_until(list(asked.values())) if asked else []
        for i, result in zip(asked, results, strict=True):
            failed = result.text.startswith(_FAILED)
            answers[i] = (
                Answer("", " ".join(result.text.split())[:300])
                if failed
                else Answer(cut_at(result.text, settings))
            )
        return [answers[i] for i in range(len(requests))]
