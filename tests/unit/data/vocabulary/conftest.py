"""A SentencePiece model that only sentencepiece reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece


@pytest.fixture(scope="session")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Normalized text and unigram pieces: no exact form in the tokenizers library."""
    prefix = tmp_path_factory.mktemp("unigram") / "tokenizer"
    text = ["a red cat sits on the mat", "what is it? it is 7 or 3", "a line of text"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(prefix), model_type="unigram",
        vocab_size=60, hard_vocab_limit=False, user_defined_symbols=["<|user|>", "<|end|>"],
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return prefix.parent
