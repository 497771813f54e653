"""Special tokens in the text of a conversation: tokens by default, or kept as text."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from moiie_megatron.data.encode.encoder import Encoded, encode, encode_prompt
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer, load_tokenizer
from moiie_megatron.data.records.record import BadRecord, Record, Turn
from tests.helpers.tokenizer_kinds import KINDS
from tests.helpers.user_errors import user_error

QUESTION = "<image>\nIs <|end|> or </s> it 7?"
ANSWER = "It is <|eot_id|> 7. </s>"


def sample(tokenizer: Tokenizer, question: str = QUESTION, answer: str = ANSWER) -> Encoded:
    record = Record("r", ("x",) * question.count("<image>"), (Turn("user", question),
                    Turn("assistant", answer)))  # fmt: skip
    return encode(record, tokenizer, load_template("phi3", tokenizer), 4, 999)


def count(tokenizer: Tokenizer, encoded: Encoded, marker: str) -> int:
    return encoded.tokens.tolist().count(tokenizer.token_id(marker))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"wordpiece", "qwen", "gpt2"}))
def test_markers_are_kept_as_text(kind: str, tmp_path: Path) -> None:
    """The ids of the template are as ever, and those of the text say the text."""
    folder = KINDS[kind](tmp_path)
    as_tokens = load_tokenizer(folder)
    as_text = pickle.loads(pickle.dumps(load_tokenizer(folder, markers_in_text="text")))
    plain = "<image>\nIs it 7?", "It is 7."
    before, after = sample(as_tokens, *plain), sample(as_text, *plain)
    assert before.tokens.tolist() == after.tokens.tolist()
    assert before.labels.tolist() == after.labels.tolist()
    encoded = sample(as_text)
    assert count(as_text, encoded, "</s>") == count(as_text, encoded, "<|eot_id|>") == 0
    assert count(as_text, encoded, "<|end|>") == 2  # the ends of both turns
    text = as_text.decode(encoded.tokens.tolist(), skip_special_tokens=True)
    learned = as_text.decode([i for i in encoded.labels.tolist() if i != -100])
    written = "".join(text.split())
    assert "".join(QUESTION.removeprefix("<image>").split()) in written
    assert "".join(learned.split()) == "".join(f"{ANSWER}<|end|>".split())
    assert encoded.markers == ()
    ids, types = encode_prompt([Turn("user", QUESTION)], as_text, load_template("phi3", as_text), 4)
    assert ids.tolist() == encoded.tokens.tolist()[: len(ids)] and types.sum() == 4


@pytest.mark.parametrize("kind", ["llama3", "llama2", "phi3-rstrip", "model-decoder"])
def test_markers_become_tokens_and_are_named(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(KINDS[kind](tmp_path))
    encoded = sample(tokenizer)
    assert encoded.markers == ("</s>", "<|end|>", "<|eot_id|>")
    assert count(tokenizer, encoded, "</s>") == 2 and count(tokenizer, encoded, "<|end|>") == 3
    assert sample(tokenizer, "<image>\nIs it?", "a</ s>").markers == ()


def test_an_image_token_in_the_text_is_no_image(tmp_path: Path) -> None:
    """Where the image token is not the placeholder of records."""
    folder = KINDS["llama3"](tmp_path)
    tokenizer = load_tokenizer(folder, "<|picture|>")
    with pytest.raises(BadRecord, match=r"image token <\|picture\|> in its text"):
        sample(tokenizer, "<image>\nIs <|picture|> it?", "no")
    with user_error("<|picture|>", "data.markers_in_text"):
        template = load_template("phi3", tokenizer)
        encode_prompt([Turn("user", "a <|picture|>")], tokenizer, template, 4)
    as_text = load_tokenizer(folder, "<|picture|>", "text")
    encoded = sample(as_text, "<image>\nIs <|picture|> it?", "no")
    assert encoded.tokens.tolist().count(as_text.image_id) == encoded.token_types.sum() == 4
    assert "Is <|picture|> it?" in as_text.decode(encoded.tokens.tolist())


def test_reserved_characters(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(KINDS["llama3"](tmp_path), markers_in_text="text")
    with pytest.raises(BadRecord, match=r"U\+100001 for private use"):
        sample(tokenizer, "a \U00100001", "b")


def test_not_for_models_without_an_exact_form(unigram: Path) -> None:
    with user_error("data.markers_in_text", unigram):
        load_tokenizer(unigram, markers_in_text="text")
