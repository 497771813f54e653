"""Answers of an exported model: alone, in a batch, as a stream."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moiie_megatron.exported.model import ExportedModel
from tests.helpers.tiny_export import POSITIONS, ask, picture
from tests.helpers.user_errors import user_error

CONVERSATIONS = [
    ask("Hi?"),
    ask("What is it then, and why?", picture(0)),
    ask("Both?", picture(1), picture(2)),
    [*ask("Left?", picture(3)), {"role": "assistant", "content": "No."}, *ask("Right?")],
]


def _greedy(model: ExportedModel, conversation: list[dict[str, Any]], steps: int) -> list[int]:
    """New ids by whole forward passes: no cache, no padding, nothing of ``generate``."""
    inputs = dict(model.encode(conversation))
    length = inputs["input_ids"].shape[1]
    for _ in range(steps):
        with torch.no_grad():
            logits = model.model(**inputs, use_cache=False).logits
        new = logits[:, -1:].argmax(dim=-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
        zero = torch.zeros_like(new)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zero], dim=1)
    return inputs["input_ids"][0, length:].tolist()


@pytest.fixture(scope="module")
def ids(model: ExportedModel) -> list[list[int]]:
    free = {"eos_token_id": -1}
    rows = [
        model.generate([model.encode(c)], max_new_tokens=12, generation=free)[0]
        for c in CONVERSATIONS
    ]
    assert len({tuple(row) for row in rows}) == len(rows)
    return rows


def test_one_prompt_is_the_greedy_continuation(model: ExportedModel, ids: list[list[int]]) -> None:
    for conversation, row in zip(CONVERSATIONS, ids, strict=True):
        assert row == _greedy(model, conversation, 12)


def test_a_batch_answers_what_its_prompts_answer_alone(
    model: ExportedModel, ids: list[list[int]]
) -> None:
    prompts = [model.encode(c) for c in CONVERSATIONS]
    free = {"eos_token_id": -1}
    assert model.generate(prompts, max_new_tokens=12, generation=free) == ids
    # The first row ends early, the others go on; the end is not part of the answer.
    end = {"eos_token_id": [ids[0][4]]}
    want = [
        row[: row.index(end["eos_token_id"][0])] if end["eos_token_id"][0] in row else row
        for row in ids
    ]
    assert len(want[0]) <= 4 < max(len(row) for row in want)
    assert model.generate(prompts, max_new_tokens=12, generation=end) == want
    assert model.generate([]) == [] and model.answer([]) == []


def test_answers_are_text_without_markers(model: ExportedModel) -> None:
    want = [model.decode(row) for row in model.generate([model.encode(c) for c in CONVERSATIONS])]
    assert model.answer(CONVERSATIONS) == want
    tokens = model.processor.tokenizer
    assert model.decode(tokens.encode("<|user|> hi<|end|>\n")) == "hi"


def test_pictures_by_path_and_beside_their_places(model: ExportedModel, tmp_path: Path) -> None:
    picture(5).save(tmp_path / "a.png")
    given = model.encode(ask("Which?", picture(5)))
    assert given["pixel_values"].shape == (1, 3, 8, 8)
    for same in (
        model.encode(ask("Which?", tmp_path / "a.png")),
        model.encode(ask("Which?", str(tmp_path / "a.png"))),
        model.encode([{"role": "user", "content": "<image>\nWhich?"}], images=[picture(5)]),
    ):
        assert set(same) == set(given)
        assert all(torch.equal(same[key], given[key]) for key in given)


def test_a_picture_is_upright_rgb_as_in_training(model: ExportedModel) -> None:
    turned = picture(6)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    upright = picture(6).transpose(Image.Transpose.ROTATE_270)
    transparent = picture(6).convert("RGBA")
    transparent.putalpha(7)
    for one, other in ((turned, upright), (transparent, picture(6))):
        pixels = [model.encode(ask("a", x))["pixel_values"] for x in (one, other)]
        assert torch.equal(*pixels)


def test_blanked_pictures_have_the_mean_colour(model: ExportedModel) -> None:
    prompt = model.encode(ask("a", picture(0), picture(1)))
    blanked = model.blanked(prompt)
    assert blanked["pixel_values"].shape == prompt["pixel_values"].shape == (2, 3, 8, 8)
    assert blanked["pixel_values"].abs().max() < 0.01 < prompt["pixel_values"].abs().max()
    assert blanked["input_ids"] is prompt["input_ids"]
    text = model.encode(ask("a"))
    assert model.blanked(text) == text


def test_sampling(model: ExportedModel) -> None:
    settings = {"do_sample": True, "temperature": 2.0}
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        prompts = [model.encode(CONVERSATIONS[0])]
        answers.add(tuple(model.generate(prompts, generation=settings, max_new_tokens=8)[0]))
    assert len(answers) == 4


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_a_stream_gives_the_answer_in_pieces(number: int, model: ExportedModel) -> None:
    conversation = CONVERSATIONS[number]
    pieces = list(model.stream(conversation, max_new_tokens=40))
    assert "".join(pieces).strip() == model.answer([conversation], max_new_tokens=40)[0]


def test_a_closed_stream_ends_the_computation(model: ExportedModel) -> None:
    steps: list[int] = []
    space = model.processor.tokenizer.encode(" ", add_special_tokens=False)[0]

    def spaces(_: Any, __: Any, output: Any) -> Any:
        """Text is given out up to the last space."""
        steps.append(1)
        time.sleep(0.01)
        output.logits = torch.nn.functional.one_hot(
            torch.full(output.logits.shape[:2], space), output.logits.shape[2]
        ).float()
        return output

    handle = model.model.register_forward_hook(spaces)
    try:
        stream = model.stream(ask("A b c?"), max_new_tokens=100)
        assert next(stream) == " "
        stream.close()
    finally:
        handle.remove()
    assert 0 < len(steps) < 50
    assert not any(t.name == "stream" and t.is_alive() for t in threading.enumerate())
    assert model.answer([ask("Hi?")], max_new_tokens=2)  # nobody waits for it


def test_a_failure_inside_a_stream_reaches_the_caller(model: ExportedModel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    handle = model.model.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of luck"):
            list(model.stream(ask("Hi?")))
    finally:
        handle.remove()
    assert list(model.stream(ask("Hi?"))) is not None


def test_too_long(model: ExportedModel) -> None:
    length = model.encode(ask("a"))["input_ids"].shape[1]
    room = POSITIONS - length
    model.encode(ask("a"), max_new_tokens=room)
    with user_error(length, room + 1, POSITIONS):
        model.encode(ask("a"), max_new_tokens=room + 1)
    with user_error("exceeds", POSITIONS):
        model.stream(ask("a" * POSITIONS))


def test_places_and_pictures_must_agree(model: ExportedModel) -> None:
    with user_error("1 pictures", "<image> 2 times"):
        model.encode(ask("a <image> in the text", picture(0)))
    with user_error("0 pictures", "<image> 1 times"):
        model.answer([ask("fine"), ask("a <image>")])


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"temprature": 1.0}, ("temprature", "temperature")),
        ({"max_length": 3}, ("max_length",)),
        ({"num_return_sequences": 2}, ("num_return_sequences",)),
        ({"do_sample": True, "temperature": -1.0}, ("temperature",)),
    ],
)
def test_settings_that_cannot_be_used(
    settings: dict[str, Any], parts: tuple[str, ...], model: ExportedModel
) -> None:
    with user_error(*parts):
        model.answer([ask("a")], generation=settings)
    with user_error(*parts):
        model.stream(ask("a"), generation=settings)
