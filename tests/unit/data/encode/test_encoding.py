"""An encoding: the sample of training, its length before truncation, and pickling."""

from __future__ import annotations

import pickle

import pytest
import torch

from moiie_megatron.data.encode.encoder import IGNORE, encode
from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import BadRecord, Record, Turn

RECORD = Record("r", ("x",), (Turn("user", "<image>\nq"), Turn("assistant", "abcdef")))


def test_truncates_to_its_own_sequence_length(llama3: Tokenizer) -> None:
    template = load_template("plain", llama3)
    encoding = Encoding(llama3, template, 3, 6)
    expected = encode(RECORD, llama3, template, 3, 6)
    for one in (encoding, pickle.loads(pickle.dumps(encoding))):
        encoded = one.encode(RECORD)
        assert torch.equal(encoded.tokens, expected.tokens) and len(encoded.tokens) == 6
        assert torch.equal(encoded.labels, expected.labels)
        assert torch.equal(encoded.token_types, expected.token_types)
        tokens, labels = one.measure(RECORD)
        assert tokens == len(encode(RECORD, llama3, template, 3, 999).tokens) == 11
        assert labels == int((encoded.labels != IGNORE).sum()) == 3
    with pytest.raises(BadRecord):
        Encoding(llama3, template, 8, 6).encode(RECORD)
    with pytest.raises(BadRecord):
        encoding.measure(Record("r", (), (Turn("user", "q"),)))
