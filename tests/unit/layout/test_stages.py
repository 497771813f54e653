"""How decoder layers are divided among pipeline stages, and those among ranks."""

from __future__ import annotations

import pytest

from moiie_megatron.layout.stages import describe_ranks, layers_of_ranks, layers_of_stages


@pytest.mark.parametrize(
    ("stages", "given", "sizes"),
    [
        (1, None, [8]),
        (4, None, [2, 2, 2, 2]),
        (3, None, None),
        (3, [2, 3, 3], [2, 3, 3]),
        (3, [2, 3, 4], None),
        (2, [2, 3, 3], None),
    ],
)
def test_sizes(stages: int, given: list[int] | None, sizes: list[int] | None) -> None:
    assert layers_of_stages(8, stages, given) == sizes


@pytest.mark.parametrize(
    ("sizes", "ranks", "layers"),
    [
        ([2, 2, 2], 3, [[[0, 1]], [[2, 3]], [[4, 5]]]),
        # Megatron's order of virtual stages, transformer_block.py: get_num_layers_to_build.
        ([2, 2, 2, 2], 2, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        ([1] * 8, 2, [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]),
        ([1, 2, 3, 2], 2, [[[0], [3, 4, 5]], [[1, 2], [6, 7]]]),
    ],
)
def test_ranks(sizes: list[int], ranks: int, layers: list[list[list[int]]]) -> None:
    found = layers_of_ranks(sizes, ranks)
    assert [[[*stage] for stage in rank] for rank in found] == layers


def test_description() -> None:
    assert describe_ranks([1, 2, 3, 2], 2) == [
        "pipeline rank 0: vision encoder, connector, embedding, layers 0, 3-5",
        "pipeline rank 1: layers 1-2, 6-7, output layer",
    ]
