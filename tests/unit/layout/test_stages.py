"""How decoder layers are divided among pipeline stages, and those among ranks."""

from __future__ import annotations

import pytest

from moiie_megatron.layout.stages import layers_of_ranks, layers_of_stages


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
        ([2, 2, 2, 2], 4, [["0-1"], ["2-3"], ["4-5"], ["6-7"]]),
        # Megatron's order of virtual stages, transformer_block.py: get_num_layers_to_build.
        ([2, 2, 2, 2], 2, [["0-1", "4-5"], ["2-3", "6-7"]]),
        ([1, 1, 1, 1, 1, 1, 1, 1], 2, [["0", "2", "4", "6"], ["1", "3", "5", "7"]]),
        ([1, 2, 3, 2], 2, [["0", "3-5"], ["1-2", "6-7"]]),
    ],
)
def test_ranks(sizes: list[int], ranks: int, layers: list[list[str]]) -> None:
    found = [
        ["-".join(dict.fromkeys([str(stage[0]), str(stage[-1])])) for stage in rank]
        for rank in layers_of_ranks(sizes, ranks)
    ]
    assert found == layers
