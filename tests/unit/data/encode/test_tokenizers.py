"""Tokenizers: sentencepiece is the oracle for its own models, tokenizers for its own."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer as Backend

from moiie_megatron.data.encode.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.user_errors import user_error

TEXTS = ["a red cat", "  two  spaces", "", " ", "line\n\nline", "it is 7", "mat\t x", "<image>a"]


def test_sentencepiece_ids_are_sentencepieces(phi3_model: Path, phi3: Tokenizer) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(phi3_model))
    assert (phi3.bos_id, phi3.eos_id, phi3.pad_id) == (1, 2, 3)
    assert phi3.vocab_size == oracle.get_piece_size()
    for text in TEXTS:
        assert phi3.encode(text) == oracle.encode(text), text
        assert phi3.decode(phi3.encode(text)) == oracle.decode(oracle.encode(text)), text
    assert phi3.decode(phi3.encode("a  red\n cat")) == "a  red\n cat"


def test_sentencepiece_control_pieces_in_text(phi3_model: Path, phi3: Tokenizer) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(phi3_model))
    end = oracle.piece_to_id("<|end|>")
    assert oracle.is_control(end) and end not in oracle.encode("a<|end|>")  # what is repaired
    assert phi3.encode("a<|end|>") == [*oracle.encode("a"), end]
    assert phi3.encode("a</s>")[-1] == phi3.eos_id
    assert phi3.decode(phi3.encode("a<|end|>")) == "a<|end|>"
    ids = [*phi3.encode("<|user|>a<|end|>"), phi3.eos_id, 9999, -1]
    assert phi3.decode(ids, skip_special_tokens=True).strip() == "a"


def test_ids_of_single_pieces(phi3: Tokenizer, llama3: Tokenizer) -> None:
    assert phi3.token_id("<image>") == phi3.image_id < phi3.vocab_size
    assert phi3.token_id("<|nothing|>") is None
    assert llama3.token_id("<|eot_id|>") == llama3.eos_id
    assert llama3.token_id("<|nothing|>") is None


def test_an_image_token_outside_the_vocabulary(phi3_model: Path, llama3: Tokenizer) -> None:
    assert llama3.image_id == llama3.vocab_size == 256 + 5
    other = load_tokenizer(phi3_model, image_token="<picture>")
    assert other.image_id == other.vocab_size
    assert llama3.decode([llama3.image_id, *llama3.encode("x")]) == "x"


def test_hugging_face_folder(llama3_folder: Path, llama3: Tokenizer) -> None:
    backend = Backend.from_file(str(llama3_folder / "tokenizer.json"))
    backend.no_truncation()
    for text in [*TEXTS, "caf\u00e9 <|eot_id|> x"]:
        assert llama3.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert llama3.decode(llama3.encode(text)) == text
    assert llama3.bos_id == backend.token_to_id("<|begin_of_text|>")
    assert llama3.eos_id == llama3.pad_id == backend.token_to_id("<|eot_id|>")
    assert llama3.special_tokens["bos_token"] == "<|begin_of_text|>"
    assert llama3.chat_template and "add_generation_prompt" in llama3.chat_template
    assert llama3.decode(llama3.encode("a<|eot_id|>"), skip_special_tokens=True) == "a"


def test_a_file_means_its_folder(llama3_folder: Path, phi3_model: Path, phi3: Tokenizer) -> None:
    assert load_tokenizer(llama3_folder / "tokenizer.json").chat_template
    assert load_tokenizer(phi3_model.parent).encode("a cat") == phi3.encode("a cat")


def test_tokenizers_survive_pickling(phi3: Tokenizer, llama3: Tokenizer) -> None:
    for tokenizer in (phi3, llama3):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode("a<|end|> cat</s>") == tokenizer.encode("a<|end|> cat</s>")
        assert again.eos_id == tokenizer.eos_id


def test_unusable_paths(tmp_path: Path, llama3_folder: Path) -> None:
    with user_error("data.tokenizer", tmp_path / "none"):
        load_tokenizer(tmp_path / "none")
    with user_error("data.tokenizer", tmp_path, "0 .model files"):
        load_tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with user_error("data.tokenizer", tmp_path / "a.txt"):
        load_tokenizer(tmp_path / "a.txt")
    tiktoken = tmp_path / "tokenizer.model"
    tiktoken.write_text("IQ== 0\nIg== 1\n")
    with user_error("data.tokenizer", tiktoken, "SentencePiece"):
        load_tokenizer(tiktoken)
    (tmp_path / "tokenizer.json").write_text("{}")
    with user_error("data.tokenizer", tmp_path / "tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    shutil.copytree(llama3_folder, tmp_path / "no_eos")
    config = tmp_path / "no_eos" / "tokenizer_config.json"
    values = json.loads(config.read_text())
    del values["eos_token"]
    config.write_text(json.dumps(values))
    with user_error("data.tokenizer", tmp_path / "no_eos", "eos_token"):
        load_tokenizer(tmp_path / "no_eos")
