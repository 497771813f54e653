"""Rows of a padded vocabulary."""

from __future__ import annotations

import pytest

from moiie_megatron.layout.vocabulary import is_padded_vocab, padded_vocab_size


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "rows"),
    [
        (32001, 1, 32001),
        (32001, 2, 32256),  # as Megatron-LM pads it: the next multiple of 128 * 2
        (32001, 8, 32768),
        (32064, 2, 32064),
        (32064, 64, 32064),
        (50257, 4, 50688),
        (41, 8, 1024),
    ],
)
def test_rows(vocab_size: int, tensor: int, rows: int) -> None:
    assert padded_vocab_size(vocab_size, tensor) == rows
    assert is_padded_vocab(rows, vocab_size)


@pytest.mark.parametrize("rows", [32000, 32002, 32064, 32128, 64000])
def test_another_vocabulary_is_not_taken_for_a_padded_one(rows: int) -> None:
    assert not is_padded_vocab(rows, 32001)
