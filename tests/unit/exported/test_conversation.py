"""What is a conversation and what is not; pictures that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moiie_megatron.data.encode.images import MAX_PIXELS
from moiie_megatron.exported.conversation import checked
from tests.helpers.tiny_export import ask, picture
from tests.helpers.user_errors import user_error


def test_pictures_come_in_the_order_of_their_places() -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        *ask("one", picture(0)),
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        *ask("two", picture(1), picture(2)),
    ]
    messages, pictures = checked(conversation)
    assert [p.tobytes() for p in pictures] == [picture(n).tobytes() for n in range(3)]
    assert messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "one"}]
    assert messages[0] == conversation[0]


@pytest.mark.parametrize(
    ("conversation", "parts"),
    [
        ([], ("empty",)),
        ([{"role": "user"}], ("role and content",)),
        (["Hi"], ("Hi",)),
        ([{"role": "tool", "content": "a"}], ("tool", "assistant")),
        ([{"role": "user", "content": None}], ("None",)),
        ([{"role": "user", "content": []}], ("[]",)),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], ("video",)),
        ([{"role": "user", "content": [{"type": "image"}]}], ("PIL image",)),
        ([{"role": "user", "content": [{"type": "image", "image": b"x"}]}], ("PIL image",)),
        ([{"role": "user", "content": "a\ud800"}], ("surrogate", 1)),
        ([{"role": "assistant", "content": "a"}], ("assistant", "user")),
    ],
)
def test_no_conversation(conversation: list[Any], parts: tuple[Any, ...]) -> None:
    with user_error(*parts):
        checked(conversation)


def test_pictures_in_two_ways() -> None:
    with user_error("1 pictures among its parts", "1 beside it"):
        checked(ask("a <image>", picture(0)), [picture(1)])


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    picture(0, 200, 200).save(tmp_path / "cut.png")
    cut = (tmp_path / "cut.png").read_bytes()[:5000]
    (tmp_path / "cut.png").write_bytes(cut)
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name in ("text.png", "cut.png", "drawing.svg", "missing.png"):
        with user_error(tmp_path / name):
            checked(ask("a", picture(0), tmp_path / name))
    with user_error("Image 2"):
        checked(ask("a", picture(0), Image.open(tmp_path / "cut.png")))
    with user_error("Image 1", "floating-point"):
        checked(ask("a", Image.new("F", (4, 4))))


def test_pictures_of_too_many_pixels() -> None:
    with user_error("Image 1", MAX_PIXELS):
        checked(ask("a", Image.new("1", (2**14, 2**12 + 1))))
    with user_error("https://example.com/a.png", "does not exist"):
        checked(ask("a", "https://example.com/a.png"))
