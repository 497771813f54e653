"""Answer the requests of a file in batches; one that cannot be answered costs only itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.generation.generator import Generator
from moiie_megatron.generation.prompt import Prompt
from moiie_megatron.generation.requests import Request
from moiie_megatron.generation.sampling import Sampling
from moiie_megatron.utils.errors import UserError


def answer_requests(
    generator: Generator,
    requests: Sequence[Request],
    images: str | Path,
    *,
    first: int = 0,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[list[dict[str, Any]]]:
    """Answer all requests from number ``first`` on.

    Every rank calls this with the same requests and reads all batches.

    Args:
        images: The directory that image paths are relative to.
        batch_size: Requests that share forward passes, on all data-parallel replicas together.
        max_new_tokens: Longest answer.
        sampling: What is drawn for a request depends on the seed and its number alone.

    Yields:
        For each request of a batch ``id``, ``answer``, ``new_tokens`` and ``finish_reason``
        (``stop``, or ``length`` where the answer was cut off), or ``id`` and ``error``.
    """
    loader = generator.image_loader(images)
    for start in range(first, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        results: list[dict[str, Any]] = [{"id": request.id} for request in batch]
        prompts: dict[int, Prompt] = {}
        for i, request in enumerate(batch):
            try:
                prompts[i] = _prompt(generator, loader, request, max_new_tokens)
            except UserError as error:
                results[i]["error"] = str(error)
        answers = generator.generate(
            list(prompts.values()), max_new_tokens, sampling, [start + i for i in prompts]
        )
        for i, ids in zip(prompts, answers, strict=True):
            results[i] |= {
                "answer": generator.text(ids),
                "new_tokens": len(ids),
                "finish_reason": "length" if len(ids) == max_new_tokens else "stop",
            }
        yield results


def _prompt(
    generator: Generator, loader: ImageLoader, request: Request, max_new_tokens: int
) -> Prompt:
    if request.error:
        raise UserError(request.error)
    prompt = generator.prompt(request.turns, [loader.load(path) for path in request.images])
    generator.check_length(prompt, max_new_tokens)
    return prompt
