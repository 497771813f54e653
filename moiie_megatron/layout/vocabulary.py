"""Rows of the embedding table and the output layer where tensor parallelism does not divide them.

As Megatron-LM does (``make_vocab_size_divisible_by``, 128 times the degree), the table is padded;
one that the degree divides is left as it is.  The rows behind the vocabulary are no tokens: logits
and losses leave them out, and exports do not have them.
"""

from __future__ import annotations

import math

_MULTIPLE = 128
_MAX_TENSOR = 128  # no model is split among more ranks


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the table.

    Args:
        vocab_size: Rows that are tokens.
        tensor: Degree of tensor parallelism.
    """
    if vocab_size % tensor == 0:
        return vocab_size
    multiple = _MULTIPLE * tensor
    return math.ceil(vocab_size / multiple) * multiple


def is_padded_vocab(rows: int, vocab_size: int) -> bool:
    """Whether a table of so many rows is a vocabulary's, padded for any degree or not at all."""
    degrees = range(1, _MAX_TENSOR + 1)
    return any(padded_vocab_size(vocab_size, tensor) == rows for tensor in degrees)
