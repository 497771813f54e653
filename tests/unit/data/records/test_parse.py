"""The names that keys and roles may have, and what is refused or noted because it is not read."""

from __future__ import annotations

from typing import Any

import pytest

from moiie_megatron.data.records.parse import parse_record
from moiie_megatron.data.records.record import BadRecord, Record, Turn

HUMAN = {"from": "human", "value": "<image>\nWhat?"}
GPT = {"from": "gpt", "value": "A cat."}
TEXT = {"from": "human", "value": "What?"}
WANTED = Record("7", ("a.jpg",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat.")))


def refused(value: Any) -> str:
    with pytest.raises(BadRecord) as caught:
        parse_record(value)
    return caught.value.reason


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.jpg", "conversations": [HUMAN, GPT]},
        {"images": "a.jpg", "conversations": [HUMAN, GPT]},
        {"images": ["a.jpg"], "messages": [HUMAN, GPT]},
        {"image": "a.jpg", "images": "a.jpg", "conversations": [HUMAN, GPT]},
        {"image": None, "images": ["a.jpg"], "conversations": [HUMAN, GPT]},
        {"images": [{"path": "a.jpg", "bytes": None}], "conversations": [HUMAN, GPT]},
        {"image": ["a.jpg"], "conversations": [TEXT, GPT]},  # in front of the first human turn
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "user", "value": "<image>\nWhat?"},
                {"from": "assistant", "value": "A cat."},
            ],
        },
        {
            "images": ["a.jpg"],
            "messages": [
                {"role": "user", "content": "<image>\nWhat?"},
                {"role": "assistant", "content": "A cat."},
            ],
        },
        {
            "images": ["a.jpg"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ],
        },
        *(
            {
                "messages": [
                    {"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": "A cat."},
                ],
            }
            for part in (
                {"type": "image", "image": "a.jpg"},
                {"type": "image", "path": "a.jpg"},
                {"type": "image_url", "image_url": {"url": "a.jpg"}},
            )
        ),
    ],
)
def test_names_of_the_same_record(record: dict[str, Any]) -> None:
    found = parse_record({"id": 7, **record})
    assert found == WANTED and found.notes == ()


def test_a_list_of_turns_alone() -> None:
    """As the shards of Megatron's own LLaVA example hold it."""
    turns = (Turn("user", "What?"), Turn("assistant", "A cat."))
    assert parse_record([TEXT, GPT], default_id="x") == Record("x", (), turns)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_in_a_key_of_its_own(key: str) -> None:
    found = parse_record({key: "Be brief.", "conversations": [TEXT, GPT]})
    assert found.turns[0] == Turn("system", "Be brief.") and len(found.turns) == 3
    said = [{"from": "system", "value": "Be brief."}, TEXT, GPT]
    assert parse_record({key: "Be brief.", "conversations": said}) == found
    assert len(parse_record({key: "", "conversations": [TEXT, GPT]}).turns) == 2
    assert "differ" in refused({key: "Be long.", "conversations": said})


def test_the_assistant_speaks_first() -> None:
    """That turn is dropped, as LLaVA does; with a system turn too."""
    system = {"from": "system", "value": "Be brief."}
    for lead in ([], [system]):
        found = parse_record({"conversations": [*lead, GPT, TEXT, GPT]})
        assert found == parse_record({"conversations": [*lead, TEXT, GPT]})
        assert found.notes == ("the assistant speaks first: that turn is dropped",)
    assert "turn 1 is by the assistant" in refused({"conversations": [GPT, GPT, TEXT, GPT]})


@pytest.mark.parametrize(
    "key",
    ["image_path", "img", "image_file", "Image", "IMAGES", "img_path", "image_url", "imageFiles"],
)
def test_images_under_a_key_that_is_not_read(key: str) -> None:
    record = {key: "a.jpg", "conversations": [TEXT, GPT]}
    assert f"key {key} is not read" in refused(record)
    assert parse_record({**record, key: None}).turns
    found = parse_record({**record, "image": "b.jpg"})  # then it is a remark
    assert found.images == ("b.jpg",) and found.notes == (f"key {key!r} is not read",)


@pytest.mark.parametrize("key", ["video", "videos", "video_path", "audio", "Audio_File", "sound"])
def test_videos_and_sounds(key: str) -> None:
    record = {"image": "b.jpg", key: "a.mp4", "conversations": [TEXT, GPT]}
    assert "not supported" in refused(record) and key in refused(record)
    assert parse_record({**record, key: []}).images == ("b.jpg",)


@pytest.mark.parametrize("placeholder", ["<video>", "<audio>"])
def test_placeholders_of_videos_and_sounds(placeholder: str) -> None:
    turn = {"from": "human", "value": f"{placeholder}\nWhat?"}
    assert placeholder in refused({"conversations": [turn, GPT]})
    answer = {"from": "gpt", "value": f"{placeholder} is an element of HTML."}
    assert parse_record({"conversations": [TEXT, answer]}).turns


def test_other_keys_are_noted() -> None:
    """Sizes and names of data sets harm nothing; what the program may mean by them is not known."""
    extra = {"width": 640, "image_id": 7, "dataset": "coco", "videogame": "chess"}
    found = parse_record({**extra, "conversations": [TEXT, GPT]})
    assert found.notes == tuple(f"key {key!r} is not read" for key in extra)
    known = {"_comment": "x", "id": 1, "kind": "which", "question_id": 3, "category": "x"}
    assert not parse_record({**known, "conversations": [TEXT, GPT]}).notes


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"image": "a", "images": ["b"], "conversations": [TEXT, GPT]}, "image and images differ"),
        ({"conversations": [TEXT, GPT], "messages": [GPT]}, "conversations and messages differ"),
        ({"system": ["x"], "conversations": [TEXT, GPT]}, "system must be a text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 0 must have"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "neither text nor image",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "neither text nor image"),
        ({"images": [{"bytes": "x"}], "conversations": [TEXT, GPT]}, "image must be a path"),
        (
            {
                "image": "b.jpg",
                "messages": [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}]}],
            },
            "differ",
        ),
    ],
)
def test_what_is_refused(record: dict[str, Any], part: str) -> None:
    assert part in refused(record)
