"""Messages of one person: answers as they grow, pictures, limits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.chat.conversation import Chat, Conversation, Reply
from moiie_megatron.chat.token_texts import token_texts
from moiie_megatron.convert.extract import extract_expert
from moiie_megatron.exported.model import ExportedModel
from tests.helpers.tiny_export import IMAGE_TOKENS, ask, picture
from tests.helpers.user_errors import user_error


def _last(chat: Chat, conversation: Conversation, text: str, *files: Path, **options: Any) -> Reply:
    *growing, last = chat.reply(conversation, text, files, **options)
    texts = [reply.text for reply in growing]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert all(reply.tokens is None and reply.conversation is None for reply in growing)
    assert last.conversation is not None
    return last


def test_two_messages(chat: Chat, tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, file in enumerate(files):
        picture(seed).save(file)
    one = _last(chat, Conversation(), " What is it? ", files[0], new_tokens=6)
    first = ask("What is it?", picture(0))
    assert one.text == chat.model.answer([first], max_new_tokens=6)[0] != ""
    assert one.conversation is not None and len(one.conversation.pictures) == 1
    two = _last(chat, one.conversation, "And this?", files[1], new_tokens=6)
    both = [*first, {"role": "assistant", "content": one.text}, *ask("And this?", picture(1))]
    prompt = chat.model.encode(both)
    assert two.text == chat.model.answer([both], max_new_tokens=6)[0]
    assert two.conversation is not None and len(two.conversation.messages) == 4
    # Every token of the whole conversation, with its text.
    assert two.tokens is not None
    routing, texts = two.tokens.routing, two.tokens.texts
    assert routing.tokens_S[: routing.prompt].tolist() == prompt["input_ids"][0].tolist()
    assert len(texts) == len(routing.tokens_S)
    assert "".join(texts).count("<image>") == 2 * IMAGE_TOKENS
    assert "<|user|>\n" in "".join(texts) and "And this?<|end|>" in "".join(texts)


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_small_copies_give_the_same_pixels(
    mode: str, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat.model.processor, "image_mode", mode)
    picture(3, 50, 20).save(tmp_path / "a.png")
    last = _last(chat, Conversation(), "a", tmp_path / "a.png", new_tokens=1)
    assert last.conversation is not None
    copy = last.conversation.pictures[0]
    pixels = [
        chat.model.encode(ask("a", image))["pixel_values"]
        for image in (copy.square, picture(3, 50, 20))
    ]
    assert copy.square.size == (8, 8) and torch.equal(*pixels)
    assert copy.aspect == (2.5 if mode == "square" else 1.0)


def test_sampling_differs_and_is_seeded(chat: Chat) -> None:
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        options = {"new_tokens": 12, "temperature": 2.0}
        texts.append(_last(chat, Conversation(), "Hi?", **options).text)
    assert texts[0] == texts[1] != texts[2]


def test_a_dense_model_has_no_experts_to_show(chat: Chat, export: Path, tmp_path: Path) -> None:
    folder = extract_expert(export.parent / "checkpoint", ["text.0"], tmp_path / "dense")
    dense = Chat(ExportedModel.load(folder, device="cpu"))
    assert chat.has_experts and not dense.has_experts
    assert _last(dense, Conversation(), "Hi?", new_tokens=4).tokens is None


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("", {}, ("empty",)),
        (" \n", {}, ("empty",)),
        ("x" * 61, {}, (61, 60)),
        ("a\ud800", {}, ("Unicode",)),
        ("a <image>", {}, ("<image>",)),
        ("a", {"new_tokens": 21}, (21, 20)),
        ("a", {"new_tokens": 0}, (0, 20)),
        ("a", {"temperature": 9.0}, (9.0, 2)),
    ],
)
def test_messages_that_are_not_answered(
    text: str, options: dict[str, Any], parts: tuple[Any, ...], chat: Chat
) -> None:
    with user_error(*parts):
        list(chat.reply(Conversation(), text, **options))


def test_a_conversation_that_grows_too_long(chat: Chat) -> None:
    conversation = Conversation()
    with user_error("positions"):
        for _ in range(9):
            last = _last(chat, conversation, "x" * 60, new_tokens=1)
            assert last.conversation is not None
            conversation = last.conversation
    assert len(conversation.messages) > 1


def test_texts_of_tokens_keep_their_spaces(chat: Chat) -> None:
    tokenizer = chat.model.processor.tokenizer
    text = "<|user|>\nWhat is  it? \u00e9"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts[:-2]) == text[:-1] and len(texts) == len(ids)
    assert token_texts(tokenizer, []) == []
