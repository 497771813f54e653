"""What the two models have in common: requests in chunks, kept answers, and failures by request."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from moiie_megatron.evaluation.benchmarks.plugin.kept_answers import (
    Answer,
    KeptAnswers,
    request_key,
)
from moiie_megatron.evaluation.benchmarks.plugin.pictures import postpone_decoding_errors

MAX_NEW_TOKENS: Final = 1024  # where a task says nothing, as in lmms-eval's own chat models
MAX_FAILURES: Final = 64  # one after another: then the model or the server is broken, not the data
PROGRESS: Final = "moiie progress"  # followed by the numbers of answers and of requests


class ChatModel(lmms):
    """A model of lmms-eval that answers conversations.

    Args:
        batch_size: Requests that are answered together.
        answers: File that answers are kept in; None keeps none.
        max_new_tokens: Upper limit on what the tasks ask for.
        ignored: What lmms-eval adds for other models.
    """

    is_simple = False

    def __init__(
        self,
        batch_size: int | str = 1,
        answers: str | None = None,
        max_new_tokens: int | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        postpone_decoding_errors()
        self.batch_size = int(batch_size)
        self._kept = KeptAnswers(answers)
        self._max_new_tokens = max_new_tokens

    @abc.abstractmethod
    def answer_batch(
        self, requests: Sequence[Instance], settings: Mapping[str, Any]
    ) -> list[Answer]:
        """The answers to requests with the same settings of generation."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers in the order of the requests; empty where one has failed.

        Raises:
            RuntimeError: ``MAX_FAILURES`` requests one after another have failed.
        """
        keys = [_key(request) for request in requests]
        found: list[Answer | None] = [self._kept.get(key) for key in keys]
        todo = [i for i, answer in enumerate(found) if answer is None]
        done = len(found) - len(todo)
        self._report(done, len(found))
        failures = 0
        for chunk in self._chunks(requests, todo):
            settings = requests[chunk[0]].args[2]
            answers = self.answer_batch([requests[i] for i in chunk], settings)
            self._kept.add({keys[i]: answer for i, answer in zip(chunk, answers, strict=True)})
            for i, answer in zip(chunk, answers, strict=True):
                found[i] = answer
                failures = failures + 1 if answer.error else 0
                if failures == MAX_FAILURES:
                    raise RuntimeError(f"{failures} requests in a row failed: {answer.error}")
            done += len(chunk)
            self._report(done, len(found))
        return [answer.text if answer is not None else "" for answer in found]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("No task of the catalogue asks for log-likelihoods.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("No task of the catalogue has several rounds.")

    def messages(self, request: Instance) -> ChatMessages:
        """The conversation of a request; raises what reading its pictures raises."""
        _, to_messages, _, row, task, split = request.args
        return ChatMessages(messages=to_messages(self.task_dict[task][split][row]))

    def new_tokens(self, settings: Mapping[str, Any]) -> int:
        """The longest answer that a request may have."""
        wanted = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        return wanted if self._max_new_tokens is None else min(wanted, self._max_new_tokens)

    def _chunks(self, requests: list[Instance], todo: list[int]) -> Iterator[list[int]]:
        """Requests that can be answered together: with the same settings."""
        chunk: list[int] = []
        for i in todo:
            if chunk and (
                len(chunk) == self.batch_size or requests[i].args[2] != requests[chunk[0]].args[2]
            ):
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def _report(self, done: int, total: int) -> None:
        print(f"{PROGRESS} {done} {total}", flush=True)


def sampling_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings of generation in transformers' words; greedy unless the task samples."""
    temperature = settings.get("temperature") or 0
    chosen: dict[str, Any] = {"num_beams": int(settings.get("num_beams") or 1)}
    if settings.get("do_sample", temperature > 0) and temperature > 0:
        chosen |= {"do_sample": True, "temperature": float(temperature)}
        chosen |= {name: settings[name] for name in ("top_p", "top_k") if settings.get(name)}
    return chosen


def cut_at(text: str, settings: Mapping[str, Any]) -> str:
    """The text up to the first of the task's stop strings.

    An empty line does not count: lmms-eval adds it to every task that names no stop string, and it
    would cut explanations.
    """
    stops = settings.get("until") or []
    stops = [stops] if isinstance(stops, str) else stops
    for stop in stops:
        if stop and stop != "\n\n":
            text = text.split(stop)[0]
    return text.strip()


def one_line(error: Exception) -> str:
    """What is kept of a failure."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _key(request: Instance) -> str:
    text, _, settings, row, task, split = request.args
    return request_key((task, split, row, request.idx, text), settings)
