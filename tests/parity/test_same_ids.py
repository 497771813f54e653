"""Kinds of tokenizers x templates x conversations: the same ids in training, generation, export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from moiie_megatron.data.encode.choose_template import choose_template
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.data.records.record import Turn
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.helpers.same_ids import CONVERSATIONS, TEMPLATES, Pair, as_parts, write_cases
from tests.helpers.tokenizer_kinds import KINDS
from tests.helpers.user_errors import user_error
from tests.unit.data.encode import chat_templates

REWRITING: Final = {"phi3": chat_templates.PHI3, "llama3": chat_templates.LLAMA3_FIRST}


def learned(pair: Pair, encoded: Any) -> str:
    """What the labels say."""
    return compact(pair.tokenizer.decode([i for i in encoded.labels.tolist() if i != -100]))


def compact(text: str) -> str:
    return "".join(text.split()).lower()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_same_everywhere(kind: Path, name: str) -> None:
    pair = Pair(kind, name, TEMPLATES[name])
    for title, conversation in CONVERSATIONS.items():
        with_lines = as_parts(conversation)
        for n, turn in enumerate(conversation):
            if turn.role == "user":
                asked: Sequence[Turn] = conversation[: n + 1]
                assert pair.processed_text(asked) == pair.prompt(asked), title
                asked = with_lines[: n + 1]
                assert pair.processed(asked, True) == pair.prompt(asked), title
        encoded = pair.trained(with_lines)
        ids, types = pair.processed(with_lines, False)
        assert encoded.tokens.tolist() == ids, title
        assert encoded.token_types.tolist() == types, title
        segments = pair.template.render(with_lines)
        answers = "".join(s.text for s in segments if s.train)
        if segments[0].train and pair.tokenizer.bos_id is None:  # no token predicts the first
            assert encoded.labels.tolist() == [*ids[1:], -100]
            continue
        if title == "unicode" and kind.name.startswith(("unigram", "wordpiece")):
            continue  # has no pieces for some characters
        assert learned(pair, encoded) == compact(answers), title
    (kind / "chat_template.jinja").unlink(missing_ok=True)


def test_a_saved_processor_gives_the_same_ids(kind: Path, tmp_path: Path) -> None:
    pair = Pair(kind, "phi3", None)
    pair.processor.save_pretrained(tmp_path)
    again = MoiieProcessor.from_pretrained(tmp_path)
    for title, conversation in CONVERSATIONS.items():
        asked = as_parts(conversation)[:-1]
        assert pair.processed(asked, True, again) == pair.prompt(asked), title


@pytest.mark.parametrize("built_in", REWRITING)
def test_what_cannot_be_trained_is_not_chosen(kind: Path, built_in: str) -> None:
    """Templates that rewrite earlier text: upcycling takes the built-in format, and says so."""
    (kind / "chat_template.jinja").write_text(REWRITING[built_in])
    tokenizer = load_tokenizer(kind)
    (kind / "chat_template.jinja").unlink()
    with user_error("The tokenizer's chat template", "as stage.template"):
        load_template("tokenizer", tokenizer)
    name, sentence = choose_template(tokenizer, "plain")
    assert name in REWRITING and sentence is not None
    load_template(name, tokenizer)


def test_the_cases_for_other_programs(tmp_path: Path) -> None:
    """They load as an export does, and hold the ids of its processor."""
    cases = json.loads(write_cases(tmp_path, ["qwen"], ["chatml"]).read_text())
    assert len(cases) == len(CONVERSATIONS)
    processor = MoiieProcessor.from_pretrained(tmp_path / cases[0]["directory"])
    for case in cases:
        for message in case["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "image":
                    part["image"] = str(tmp_path / part["image"])
        inputs = processor.apply_chat_template(
            case["messages"], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert inputs["input_ids"] == [case["ids"]]
        assert inputs["mm_token_type_ids"] == [case["types"]]
    assert any(1 in case["types"] for case in cases)
