"""vLLM's engine in this process, and its answers to the questions of a material file."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

MAX_MODEL_LEN = 256


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """An engine that is gone afterwards."""
    fixed = {
        "trust_remote_code": True,
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 16,
        "block_size": 32,  # of the prefix cache; the smallest for CPUs
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 3},
        "seed": 0,
    }
    llm = LLM(str(folder), **(fixed | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The questions of an export and the answers of transformers."""
    return json.loads(folder.with_suffix(".json").read_text())["rows"]


def ask(llm: LLM, rows: Sequence[dict[str, Any]], longest: int) -> list[dict[str, Any]]:
    """Greedy answers to all questions at once, in the form of the material."""
    outputs = llm.chat(
        [with_pictures(row["messages"]) for row in rows],
        SamplingParams(temperature=0, max_tokens=longest, logprobs=0),
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        (completion,) = output.outputs
        steps = zip(completion.token_ids, completion.logprobs, strict=True)
        answers.append(
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": list(completion.token_ids),
                "logprobs": [logprobs[token].logprob for token, logprobs in steps],
                "cached": output.num_cached_tokens,
            }
        )
    return answers


def with_pictures(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with pictures for paths."""

    def part(given: dict[str, str]) -> dict[str, Any]:
        if given["type"] == "text":
            return given
        return {"type": "image_pil", "image_pil": Image.open(given["image"])}

    return [message | {"content": [part(p) for p in message["content"]]} for message in messages]


def compare(
    answers: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], key: str = "answer"
) -> tuple[int, float]:
    """How many answers have transformers' tokens, and the largest difference of a log-probability
    among those; the prompts must have the same ids."""
    assert [answer["prompt"] for answer in answers] == [row["prompt"] for row in rows]
    pairs = [
        (answer, row[key])
        for answer, row in zip(answers, rows, strict=True)
        if answer["tokens"] == row[key]["tokens"]
    ]
    differences = [
        abs(one - other)
        for answer, reference in pairs
        for one, other in zip(answer["logprobs"], reference["logprobs"], strict=True)
    ]
    return len(pairs), max(differences, default=0.0)


def apply_to_model(llm: LLM, change: Callable[[Any], None]) -> None:
    """Change the model of an engine of this process."""
    llm.apply_model(change)
