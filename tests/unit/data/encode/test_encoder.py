"""Encoding: tokens, shifted labels and types, position by position."""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.data.encode.encoder import Encoded, encode, encode_prompt
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import BadRecord, Record, Turn


def record(question: str, answer: str, *images: str) -> Record:
    return Record("r", images, (Turn("user", question), Turn("assistant", answer)))


def targets(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """The text of the labels; each label must be the token that comes next."""
    labels, tokens = encoded.labels.tolist(), encoded.tokens.tolist()
    for t, label in enumerate(labels[:-1]):
        assert label in (-100, tokens[t + 1])
    return tokenizer.decode([label for label in labels if label != -100])


def test_plain_by_hand(llama3: Tokenizer) -> None:
    a, b, eos, image = *llama3.encode("ab"), llama3.eos_id, llama3.image_id
    encoded = encode(
        record("<image>\nSay.", "ab", "x.png"), llama3, load_template("plain", llama3), 3, 99
    )
    assert encoded.tokens.tolist() == [llama3.bos_id, image, image, image, a, b, eos]
    assert encoded.labels.tolist() == [-100, -100, -100, a, b, eos, -100]
    assert encoded.token_types.tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert encoded.images == ("x.png",)
    assert (encoded.tokens.dtype, encoded.labels.dtype) == (torch.int64, torch.int64)
    assert encoded.token_types.dtype == torch.int8


def test_llama3_by_hand(llama3: Tokenizer) -> None:
    encoded = encode(
        record("<image>\nq", "ok", "x.png"), llama3, load_template("llama3", llama3), 2, 99
    )
    ids = {name: llama3.token_id(f"<|{name}|>") for name in
           ("begin_of_text", "start_header_id", "end_header_id", "eot_id")}  # fmt: skip
    head = [ids["start_header_id"], *llama3.encode("user"), ids["end_header_id"]]
    reply = [ids["start_header_id"], *llama3.encode("assistant"), ids["end_header_id"]]
    image = [llama3.image_id] * 2
    before = [ids["begin_of_text"], *head, *llama3.encode("\n\n"), *image]  # BOS only once
    before += [*llama3.encode("\nq"), ids["eot_id"], *reply, *llama3.encode("\n\n")]
    answer = [*llama3.encode("ok"), ids["eot_id"]]
    assert encoded.tokens.tolist() == before + answer
    assert encoded.labels.tolist() == [-100] * (len(before) - 1) + answer + [-100]
    assert encoded.token_types.sum() == 2


def test_phi3_trains_answers_with_their_end(phi3: Tokenizer) -> None:
    turns = (
        Turn("system", "on the mat"),
        Turn("user", "what is it?"),
        Turn("assistant", "a cat"),
        Turn("user", "<image> or"),
        Turn("assistant", "3"),
    )
    phi3_with_system = Record("r", ("x.png",), turns)
    encoded = encode(phi3_with_system, phi3, load_template("phi3", phi3), 4, 999)
    end = phi3.token_id("<|end|>")
    # As inside the text: after the header's line feed no word gets a dummy prefix.
    header = phi3.encode("<|assistant|>\n")
    first, second = phi3.encode("<|assistant|>\na cat"), phi3.encode("<|assistant|>\n3")
    expected = [*first[len(header) :], end, *second[len(header) :], end]
    assert first[: len(header)] == header and phi3.decode(first).endswith("\na cat")
    assert [i for i in encoded.labels.tolist() if i != -100] == expected
    assert encoded.tokens[0] == phi3.bos_id and (encoded.tokens == phi3.bos_id).sum() == 1
    last_header = encoded.tokens.tolist().index(phi3.token_id("<|assistant|>"))
    # The header predicts its own line feed, which is not trainable.
    assert encoded.labels[last_header] == -100
    targets(encoded, phi3)


def test_tokenizer_template_and_text_only(llama3: Tokenizer) -> None:
    template = load_template("tokenizer", llama3)
    encoded = encode(record("q", "ok"), llama3, template, 4, 99)
    assert targets(encoded, llama3) == "ok<|eot_id|>"
    assert encoded.tokens[0] == llama3.bos_id  # this template does not write one
    assert encoded.token_types.sum() == 0 and encoded.images == ()


def test_several_images_keep_their_places(llama3: Tokenizer) -> None:
    encoded = encode(
        record("a<image>bc<image>", "d", "1", "2"), llama3, load_template("llama3", llama3), 2, 99
    )
    start = encoded.tokens.tolist().index(llama3.encode("a")[0], 8)
    assert encoded.token_types[start : start + 8].tolist() == [0, 1, 1, 0, 0, 1, 1, 0]


def test_a_placeholder_in_an_answer_has_no_label(llama3: Tokenizer) -> None:
    encoded = encode(record("q", "a<image>b", "1"), llama3, load_template("llama3", llama3), 2, 99)
    assert targets(encoded, llama3) == "ab<|eot_id|>"
    assert llama3.image_id not in encoded.labels


def test_long_text_is_truncated_on_the_right(llama3: Tokenizer) -> None:
    template = load_template("plain", llama3)
    long = record("<image>", "abcdef", "x.png")
    whole = encode(long, llama3, template, 3, 99)
    cut = encode(long, llama3, template, 3, 6)
    assert cut.tokens.tolist() == whole.tokens.tolist()[:6]
    assert cut.labels.tolist() == whole.labels.tolist()[:6]  # the last one is beyond the cut
    assert llama3.decode([i for i in cut.labels.tolist() if i != -100]) == "abc"


def test_what_cannot_be_truncated(llama3: Tokenizer) -> None:
    template = load_template("llama3", llama3)
    image_at_end = record("a<image>", "b", "x")
    n = encode(image_at_end, llama3, template, 4, 999).token_types.tolist()
    end = len(n) - n[::-1].index(1)
    with pytest.raises(BadRecord, match=f"ends at token {end}, beyond .* {end - 1}"):
        encode(image_at_end, llama3, template, 4, end - 1)
    with pytest.raises(BadRecord, match=f"no trainable token within the first {end} of {len(n)}"):
        encode(image_at_end, llama3, template, 4, end)
    with pytest.raises(BadRecord, match="no trainable token"):
        encode(Record("r", (), (Turn("user", "q"),)), llama3, template, 4, 99)


def test_a_refusing_chat_template_spoils_one_record(llama3: Tokenizer) -> None:
    import copy

    strict = copy.copy(llama3)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + str(llama3.chat_template)
    )
    template = load_template("tokenizer", strict)
    turns = (Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a"))
    with pytest.raises(BadRecord, match="no system"):
        encode(Record("r", (), turns), strict, template, 4, 99)


@pytest.mark.parametrize("name", ["plain", "phi3"])
def test_the_prompt_is_what_training_saw(phi3: Tokenizer, name: str) -> None:
    template = load_template(name, phi3)
    sample = record("<image>\nwhat is it?", "a cat", "x")
    trained = encode(sample, phi3, template, 3, 999)
    tokens, types = encode_prompt(sample.turns[:1], phi3, template, 3)
    n = len(tokens)
    assert trained.tokens[:n].tolist() == tokens.tolist()
    assert trained.token_types[:n].tolist() == types.tolist()
    assert trained.labels[: n - 1].eq(-100).all() and trained.labels[n - 1] != -100
