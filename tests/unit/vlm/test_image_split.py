"""Which images a tensor-parallel rank encodes, and that it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.image_split import images_of_rank
from tests.parity.tiny import build, language, run_config


@dataclass(frozen=True)
class Group:
    """Rank and size of a process group."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (0, [[], [], [], []]),
        (1, [[0], [], [], []]),
        (3, [[0], [1], [2], []]),
        (5, [[0, 1], [2, 3], [4], []]),
        (8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_parts_on_four_ranks(count: int, parts: list[list[int]]) -> None:
    groups: list[Any] = [Group(rank, 4) for rank in range(4)]
    assert [list(range(count))[images_of_rank(count, group)] for group in groups] == parts


@pytest.mark.parametrize(("positions", "images"), [(32, 1), (20, 1), (16, None), (0, 1)])
def test_another_number_of_images_is_refused(
    positions: int, images: int | None, context: ParallelContext
) -> None:
    model = build(run_config(language("llama")), context)
    types = torch.zeros(1, 40, dtype=torch.int8)
    types[0, :positions] = IMAGE
    pixels = None if images is None else torch.zeros(images, 3, 28, 28)
    with pytest.raises(ValueError, match=f"{positions} image positions.* given {images or 0} im"):
        model(torch.zeros_like(types).long(), torch.arange(40).view(1, 40), types, images=pixels)
