"""Prompts in a file, one JSON object per line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiie_megatron.data.records.parse import parse_record
from moiie_megatron.data.records.record import BadRecord, Turn
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Request:
    """A conversation to continue.

    Attributes:
        id: The record's ``id`` or ``question_id``; without one the number of its line, from 0.
        turns: They end with the user's.
        images: Image paths, in the order of their placeholders.
        error: Why the record cannot be used; empty if it can.
    """

    id: str
    turns: tuple[Turn, ...] = ()
    images: tuple[str, ...] = ()
    error: str = ""


def read_requests(path: str | Path) -> list[Request]:
    """The requests of a file; a record that cannot be used has an ``error``.

    A line holds ``prompt`` (or ``text``, as in LLaVA's question files) with ``image`` or
    ``images``, or a LLaVA record, whose last turn is left out if it is the assistant's.  Empty
    lines are none.

    Raises:
        UserError: The file cannot be read, or has no line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"--records is {path}, which cannot be read ({error.strerror or error}): name a file "
            "of one JSON object per line."
        ) from error
    requests = [_request(line, number) for number, line in enumerate(lines) if line.strip()]
    if not requests:
        raise UserError(f"--records is {path}, which is empty: put one JSON object on a line.")
    return requests


def _request(line: bytes, number: int) -> Request:
    name = str(number)
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise BadRecord("not a JSON object")
        name = str(value.get("id", value.get("question_id", number)))
        # JSON can express a lone surrogate, which could not be written.
        name = name.encode(errors="backslashreplace").decode()
        record = parse_record(_as_record(value), default_id=name)
    except BadRecord as error:
        return Request(name, error=error.reason)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return Request(name, error=f"not JSON ({error})")
    turns = record.turns
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    return Request(name, turns, record.images)


def _as_record(value: dict[str, Any]) -> dict[str, Any]:
    """The LLaVA record that a line means."""
    if "conversations" in value or "messages" in value:
        return value
    text = value.get("prompt", value.get("text"))
    if not isinstance(text, str):
        raise BadRecord("no prompt, text, conversations or messages")
    images = value.get("images", value.get("image"))
    return {"image": images, "conversations": [{"from": "human", "value": text}]}
