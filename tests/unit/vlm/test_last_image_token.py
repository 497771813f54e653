"""The routing rule of the reference's code, by hand; whole models are in tests/parity."""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.vlm.last_image_token import last_image_tokens_as_text

T, I, P = TEXT, IMAGE, PADDING  # noqa: E741


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([T, I, I, I, T, T], [T, I, I, T, T, T]),
        ([I, T, I, I, T, I], [T, T, I, T, T, T]),  # a run of one; an image token at the end
        ([T, T, T, I, I, P], [T, T, T, I, T, P]),
        ([I, I, I, I, I, I], [I, I, I, I, I, T]),  # two images without text between them
        ([T, T, T, P, P, P], [T, T, T, P, P, P]),
    ],
)
def test_by_hand(row: list[int], expected: list[int]) -> None:
    other = [T, T, I, I, T, T]  # rows do not touch each other
    types = torch.tensor([other, row, other], dtype=torch.int8)
    result = last_image_tokens_as_text(types)
    assert result.dtype == torch.int8
    assert result[1].tolist() == expected
    assert result[0].tolist() == result[2].tolist() == [T, T, I, T, T, T]
    assert types[1].tolist() == row
