"""The text of every single token, with its space in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the one before it.

    A tokenizer drops the space in front of a text's first token, so tokens are decoded in pairs.
    What is not a character by itself becomes the replacement character.
    """
    texts: list[str] = []
    before: list[int] = []
    for token in ids:
        first, both = _decoded(tokenizer, before), _decoded(tokenizer, [*before, token])
        starts_alike = both.startswith(first) and len(both) > len(first)
        texts.append(both[len(first) :] if starts_alike else _decoded(tokenizer, [token]))
        before = [token]
    return texts


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    if not ids:
        return ""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
