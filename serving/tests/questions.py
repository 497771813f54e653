"""Questions about the demo's held-out pictures, as chat messages with paths for pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CORNERS = ("top left", "top right", "bottom left", "bottom right")

Messages = list[dict[str, Any]]


def write_questions(data: Path) -> list[Messages]:
    """50 conversations: 36 with one picture, six of them of two turns; 7 with several; 7 without.

    Args:
        data: The demo's directory, of which the pictures under ``images/test/`` are used.
    """
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    by_picture: dict[str, list[list[str]]] = {}
    for row in rows:
        turns = [turn["value"] for turn in row["conversations"]]
        by_picture.setdefault(row["image"], []).append(turns)
    pictures = list(by_picture)

    def parts(text: str, *names: str) -> list[dict[str, str]]:
        images = [{"type": "image", "image": str(data / "images" / name)} for name in names]
        return [*images, {"type": "text", "text": text}]

    result = []
    for number, name in enumerate(pictures[:36]):
        question, answer = by_picture[name][number % len(by_picture[name])]
        messages: Messages = [user(parts(question.removeprefix("<image>\n"), name))]
        if number % 6 == 5:
            messages.append({"role": "assistant", "content": parts(answer)})
            messages.append(user(parts(f"And which digit is at the {CORNERS[number % 4]}?")))
        result.append(messages)
    for number in range(7):
        names = pictures[50 + 3 * number :][: 2 + number % 2]
        corner = CORNERS[number % 4]
        result.append([user(parts(f"Which digit is at the {corner} of the last one?", *names))])
    for number in range(7):
        digits = [(number + step) % 10 for step in (3, 8, 1, 6)]
        told = ", ".join(f"{c} {d}" for c, d in zip(CORNERS, digits, strict=True))
        result.append([user(parts(f"{told}. Which digit is at the {CORNERS[number % 4]}?"))])
    return result


def user(content: list[dict[str, str]]) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": content}


def num_images(messages: Messages) -> int:
    """Pictures of a conversation."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])
