"""SentencePiece models with added tokens, and copies that are read as their source."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from moiie_megatron.checkpoint.directory import copy_tokenizer
from moiie_megatron.data.encode.tokenizers import Tokenizer, load_tokenizer
from moiie_megatron.data.vocabulary.fast_tokenizer import load_fast_tokenizer
from moiie_megatron.data.vocabulary.sentencepiece_model import SentencePieceModel
from moiie_megatron.data.vocabulary.tokenizer_files import tokenizer_files
from tests.helpers.user_errors import user_error

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
TEXT = "a red<|turn|> cat<|end|>"


def ids_of(tokenizer: Tokenizer) -> Any:
    return tokenizer.encode(TEXT), tokenizer.eos_id, tokenizer.chat_template, tokenizer.image_id


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_the_backend_has_sentencepieces_ids(phi3_model: Path, dummy_prefix: bool) -> None:
    """On text with runs of spaces, markers, and what the model has no piece for."""
    model = SentencePieceModel(phi3_model.read_bytes(), "model")
    model.proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    assert model.is_exact
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.serialized())
    backend = model.backend("<s>")
    words = [*"ab ct\n\t.7", "  ", "    ", "\u00e9\u4e2d", "a red", " cat", "</s>", "<|user|>"]
    words += ["<image>", "<|end|>", "\u2581", "<unk>", "<"]
    rng = random.Random(0)
    for length in range(2, 400):
        text = "".join(rng.choices(words, k=1 + length % 40)) + "a"
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == oracle.encode(text), text
        assert backend.decode(ids, skip_special_tokens=False) == oracle.decode(ids), text
    again = backend.encode("<s>a red", add_special_tokens=False).ids
    assert again == [1, *oracle.encode("a red")]  # as BOS in front of the ids


def added_tokens_json(folder: Path, size: int) -> None:
    tokens = {"<|turn|>": size, "<|stop|>": size + 1}
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    special = {"eos_token": "<|stop|>", "bos_token": {"content": "<s>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def added_tokens_decoder(folder: Path, size: int) -> None:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    tokens = ["<|turn|>", "<|stop|>"]
    config = {
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, **flags}
            for i, token in [*enumerate(tokens, size), (2, "</s>"), (1, "<s>")]
        },
        "bos_token": "<s>",
        "eos_token": "<|stop|>",
        "chat_template": TEMPLATE,
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("write", [added_tokens_json, added_tokens_decoder])
@pytest.mark.parametrize("name", ["tokenizer.model", "spm.model"])
def test_added_tokens_beside_a_model(
    write: Any, name: str, phi3_model: Path, phi3: Tokenizer, tmp_path: Path
) -> None:
    """Markers are one id each, EOS and template are the folder's; a checkpoint keeps it all."""
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    source.mkdir()
    checkpoint.mkdir()
    shutil.copy(phi3_model, source / name)
    size = phi3.vocab_size
    write(source, size)
    copy_tokenizer(source, checkpoint)
    red, cat = phi3.encode("a red"), phi3.encode("a cat")[1:]
    for path in (source, source / name, checkpoint):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode(TEXT) == [*red, size, *cat, phi3.token_id("<|end|>")]
        assert tokenizer.encode("<|turn|>a")[0] == size  # no dummy prefix before an added token
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, size + 1)
        assert tokenizer.vocab_size == size + 2 and tokenizer.chat_template == TEMPLATE
        assert tokenizer.decode([*red, size + 1], skip_special_tokens=True) == "a red"
    fast = load_fast_tokenizer(tokenizer_files(checkpoint), "<image>")
    fast.save_pretrained(tmp_path / "export")
    again = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert again.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    assert (again.eos_token, again.chat_template) == ("<|stop|>", TEMPLATE)
    assert str(tmp_path) not in (tmp_path / "export" / "tokenizer_config.json").read_text()


def test_a_marker_that_takes_white_space(phi3_model: Path, phi3: Tokenizer, tmp_path: Path) -> None:
    shutil.copy(phi3_model, tmp_path / "tokenizer.model")
    added_tokens_decoder(tmp_path, phi3.vocab_size)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"rstrip": false', '"rstrip": true', 1))
    ids = load_tokenizer(tmp_path).encode("a<|turn|>\n  cat")
    assert ids == load_tokenizer(tmp_path).encode("a<|turn|>cat")


def test_added_tokens_that_do_not_fit(phi3_model: Path, phi3: Tokenizer, tmp_path: Path) -> None:
    shutil.copy(phi3_model, tmp_path / "tokenizer.model")
    added = tmp_path / "added_tokens.json"
    added.write_text(json.dumps({"<|turn|>": phi3.vocab_size + 5}))
    with user_error("<|turn|>", phi3.vocab_size + 5):
        load_tokenizer(tmp_path)
    added.write_text(json.dumps({"<|turn|>": 20}))
    with user_error("<|turn|>", 20):
        load_tokenizer(tmp_path)
    for text in ("[]", '{"a": "b"}', "{", "[" * 10**5):
        added.write_text(text)
        with user_error(added):
            load_tokenizer(tmp_path)


def test_a_tokenizer_json_is_copied_with_what_lies_beside_it(
    llama3_folder: Path, llama3: Tokenizer, tmp_path: Path
) -> None:
    copy_tokenizer(llama3_folder / "tokenizer.json", tmp_path)
    assert ids_of(load_tokenizer(tmp_path)) == ids_of(llama3)


def test_a_model_without_an_exact_form(unigram: Path) -> None:
    tokenizer = load_tokenizer(unigram)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(unigram / "tokenizer.model"))
    text = "\uff41 red  cat<|end|>is it?"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text) == oracle.encode(text)
    spans = [text[start:end].strip() for start, end in offsets]
    assert spans[ids.index(oracle.piece_to_id("<|end|>"))] == "<|end|>"
    assert "".join(spans).replace(" ", "") == text.replace(" ", "")
    image = tokenizer.encode_with_offsets("a<image>cat")[0]
    assert image.count(tokenizer.image_id) == 1 and tokenizer.image_id == tokenizer.vocab_size
    assert tokenizer.decode([*tokenizer.encode("a cat"), tokenizer.eos_id],
                            skip_special_tokens=True) == "a cat"  # fmt: skip
