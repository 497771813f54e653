"""Conversations get the ids that training gives them, in chat templates and tokenizers of users."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import EngineArgs
from vllm.renderers import ChatParams, renderer_from_config


def test_prompts_are_those_of_training(material: Path, note: Callable[..., None]) -> None:
    equal = total = 0
    wrong = []
    for cases in sorted((material / "prompts").glob("*/cases.json")):
        for directory, rows in groupby(
            json.loads(cases.read_text()), key=lambda case: case["directory"]
        ):
            given = list(rows)
            rendered = render(cases.parent / directory, [case["messages"] for case in given])
            for case, (ids, types) in zip(given, rendered, strict=True):
                same = (ids, types) == (case["ids"], case["types"])
                equal, total = equal + same, total + 1
                if not same:
                    wrong.append((directory, case["conversation"]))
    note("prompts of templates and tokenizers, ids and types", equal, total)
    assert wrong == []
    assert total > 80


def render(
    folder: Path, conversations: list[list[dict[str, Any]]]
) -> list[tuple[list[int], list[int]]]:
    """Ids of the prompts, and 1 for each that gets an image's embedding, as the server has them."""
    arguments = EngineArgs(
        model=str(folder),
        trust_remote_code=True,
        hf_overrides={"text_config": {"max_position_embeddings": 2048}},
        limit_mm_per_prompt={"image": 9},
        mm_processor_cache_gb=0,
    )
    renderer = renderer_from_config(arguments.create_engine_config())
    parameters = ChatParams(
        chat_template=None,
        chat_template_content_format="auto",
        chat_template_kwargs={"add_generation_prompt": True, "tokenize": False},
    )
    _, prompts = renderer.render_chat(
        [with_pictures(messages, folder.parent) for messages in conversations],
        parameters,
        renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False),
    )
    return [(prompt["prompt_token_ids"], types(prompt)) for prompt in prompts]


def types(prompt: dict[str, Any]) -> list[int]:
    result = [0] * len(prompt["prompt_token_ids"])
    for place in prompt.get("mm_placeholders", {}).get("image", []):
        assert place.is_embed is None or bool(place.is_embed.all())
        result[place.offset : place.offset + place.length] = [1] * place.length
    return result


def with_pictures(messages: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    def part(given: dict[str, str]) -> dict[str, Any]:
        if given["type"] == "text":
            return given
        return {"type": "image_pil", "image_pil": Image.open(folder / given["image"])}

    def content(given: str | list[dict[str, str]]) -> Any:
        return given if isinstance(given, str) else [part(p) for p in given]

    return [message | {"content": content(message["content"])} for message in messages]
