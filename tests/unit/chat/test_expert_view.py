"""The experts of tokens as HTML."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moiie_megatron.chat.conversation import Chat, Conversation, Tokens
from moiie_megatron.chat.expert_view import expert_view
from tests.helpers.tiny_export import IMAGE_TOKENS, picture

COLOURS = {0: "#e69f00", 3: "#0072b2"}  # vision, text


@pytest.fixture(scope="module")
def tokens(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    file = tmp_path_factory.mktemp("picture") / "a.png"
    picture(0, 40, 20).save(file)
    *_, last = chat.reply(Conversation(), "<b> & it?", [file], new_tokens=8)
    assert last.tokens is not None
    return last.tokens


def _chips(page: str) -> list[tuple[str, str]]:
    """Title and names below each token."""
    return re.findall(r'<span class="token" title="([^"]+)">.*?<small>([^<]+)</small>', page)


@pytest.mark.parametrize("number", [0, 1])
def test_every_text_token_has_its_experts(number: int, tokens: Tokens) -> None:
    routing = tokens.routing
    page = expert_view(tokens, number)
    assert f"Decoder layer {(1, 3)[number]}, MoE layer {number + 1} of 2" in page
    chips = _chips(page)
    text = [i for i, token in enumerate(routing.tokens_S.tolist()) if token != tokens.image_id]
    assert len(chips) == len(text) == len(routing.tokens_S) - IMAGE_TOKENS
    for (title, names), position in zip(chips, text, strict=True):
        experts = routing.experts_LSK[number, position].tolist()
        weights = routing.weights_LSK[number, position].tolist()
        assert names == " ".join(["V0", "S0", "S1", "T0"][e] for e in experts)
        assert title == ", ".join(
            f"{routing.names[e]} {w:.2f}" for e, w in zip(experts, weights, strict=True)
        )
    assert page.count("[picture 1]") == 1


def test_a_conversation_without_pictures(chat: Chat) -> None:
    *_, last = chat.reply(Conversation(), "Hi?", new_tokens=2)
    assert last.tokens is not None
    page = expert_view(last.tokens, 1)
    assert len(_chips(page)) == len(last.tokens.routing.tokens_S) and "<figure" not in page


def test_layers_differ(tokens: Tokens) -> None:
    assert _chips(expert_view(tokens, 0)) != _chips(expert_view(tokens, 1))


def test_colours_are_those_of_the_groups(tokens: Tokens) -> None:
    routing = replace(tokens.routing, experts_LSK=tokens.routing.experts_LSK.clone())
    routing.experts_LSK[0, -1] = routing.experts_LSK.new_tensor([3, 1])
    routing.weights_LSK[0, -1] = routing.weights_LSK.new_tensor([0.75, 0.25])
    page = expert_view(replace(tokens, routing=routing), 0)
    last = page.rpartition('<span class="token"')[2]
    assert f'style="background:{COLOURS[3]}38"' in last
    assert f"linear-gradient(90deg,{COLOURS[3]} 0% 75%,#8c8c8c 75% 100%)" in last


def test_the_grid_over_a_picture(tokens: Tokens) -> None:
    routing = replace(
        tokens.routing,
        experts_LSK=tokens.routing.experts_LSK.clone(),
        weights_LSK=tokens.routing.weights_LSK.clone(),
    )
    (positions,) = np.nonzero((routing.tokens_S == tokens.image_id).numpy())
    routing.experts_LSK[0, positions] = routing.experts_LSK.new_tensor([0, 1])
    routing.weights_LSK[0, positions] = routing.weights_LSK.new_tensor([1.0, 0.0])
    routing.weights_LSK[0, positions[1]] = routing.weights_LSK.new_tensor([0.0, 1.0])
    wide = [replace(tokens.pictures[0], aspect=2.0)]
    page = expert_view(replace(tokens, routing=routing, pictures=wide), 0)
    square, grid = (
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    )
    assert square.size == (8, 8) and grid.size == (2, 2) and grid.mode == "RGBA"
    pixels = np.asarray(grid)[..., :3].reshape(4, 3).tolist()
    assert pixels == [[0xE6, 0x9F, 0], [0x8C] * 3, [0xE6, 0x9F, 0], [0xE6, 0x9F, 0]]
    assert "Picture 1: V0 75%, S0 25% of the weight" in page
    assert "aspect-ratio:2.0000" in page


def test_text_is_escaped(tokens: Tokens) -> None:
    texts = list(tokens.texts)
    texts[0] = "<script>alert(1)</script>"
    page = expert_view(replace(tokens, texts=texts), 0)
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert re.sub(r"<[^>]+>", "", page).count("&lt;") >= 2  # of the question, too


def test_an_image_id_in_the_answer_is_text(tokens: Tokens) -> None:
    routing = replace(tokens.routing, tokens_S=tokens.routing.tokens_S.clone())
    routing.tokens_S[-1] = tokens.image_id
    page = expert_view(replace(tokens, routing=routing), 0)
    assert len(_chips(page)) == len(routing.tokens_S) - IMAGE_TOKENS
    assert page.count("[picture") == 1


def test_nothing_comes_from_elsewhere(tokens: Tokens, tmp_path: Path) -> None:
    assert "http" not in expert_view(tokens, 0)
