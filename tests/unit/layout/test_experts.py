from __future__ import annotations

import pytest

from moiie_megatron.layout.experts import ExpertLayout, Variant, moe_layers
from tests.helpers.user_errors import user_error


@pytest.mark.parametrize(
    ("variant", "counts", "allowed"),
    [
        # The four systems of the paper's table.
        ("dense", {}, {}),
        ("vanilla", {}, {"joint": [0, 1, 2, 3]}),
        ("modality", {}, {"vision": [0, 1], "text": [2, 3]}),
        ("moiie", {}, {"vision": [0, 1, 2], "text": [1, 2, 3]}),
        # Eight experts, balanced and unbalanced: every expert is reachable.
        (
            "moiie",
            {"vision": 2, "shared": 4, "text": 2},
            {"vision": [0, 1, 2, 3, 4, 5], "text": [2, 3, 4, 5, 6, 7]},
        ),
        (
            "moiie",
            {"vision": 3, "shared": 2, "text": 3},
            {"vision": [0, 1, 2, 3, 4], "text": [3, 4, 5, 6, 7]},
        ),
        ("moiie", {"vision": 2}, {"vision": [0, 1, 2, 3], "text": [2, 3, 4]}),
        ("vanilla", {"shared": 8}, {"joint": [0, 1, 2, 3, 4, 5, 6, 7]}),
        ("modality", {"vision": 3}, {"vision": [0, 1, 2], "text": [3, 4]}),
    ],
)
def test_what_each_router_scores(
    variant: Variant, counts: dict[str, int], allowed: dict[str, list[int]]
) -> None:
    layout = ExpertLayout.from_variant(variant, **counts)
    assert {router: list(layout.allowed(router)) for router in layout.routers} == allowed
    reachable = {expert for experts in allowed.values() for expert in experts}
    assert reachable == set(range(layout.num_experts))
    assert layout.is_dense == (not allowed)


def test_names_follow_the_groups() -> None:
    layout = ExpertLayout(2, 1, 3)
    names = ["vision.0", "vision.1", "shared.0", "text.0", "text.1", "text.2"]
    assert [layout.name(expert) for expert in range(layout.num_experts)] == names
    with pytest.raises(IndexError):
        layout.name(6)


@pytest.mark.parametrize(
    ("variant", "counts", "parts"),
    [
        ("moiie", {"vision": 0}, ("moe.num_vision_experts", 0, "moiie")),
        ("moiie", {"shared": 0}, ("moe.num_shared_experts", 0, "moiie")),
        ("moiie", {"text": 0}, ("moe.num_text_experts", 0, "moiie")),
        ("moiie", {"vision": -1}, ("moe.num_vision_experts", -1)),
        ("vanilla", {"vision": 1}, ("moe.num_vision_experts", 1, "vanilla")),
        ("vanilla", {"shared": 0}, ("moe.num_shared_experts", 0, "vanilla")),
        ("modality", {"shared": 2}, ("moe.num_shared_experts", 2, "modality")),
        ("dense", {"text": 4}, ("moe.num_text_experts", 4, "dense")),
        ("moiie", {"top_k": 4}, ("moe.top_k", 4, "vision router", 3)),
        ("moiie", {"vision": 3, "top_k": 4}, ("moe.top_k", 4, "text router", 3)),
        ("modality", {"text": 1}, ("moe.top_k", 2, "text router", 1)),
        ("vanilla", {"shared": 1}, ("moe.top_k", 2, "joint router", 1)),
    ],
)
def test_impossible_layout(
    variant: Variant, counts: dict[str, int], parts: tuple[object, ...]
) -> None:
    with user_error(*parts):
        ExpertLayout.from_variant(variant, **counts)


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("interleaved", 6, [1, 3, 5]),
        ("interleaved", 5, [1, 3]),
        ("all", 3, [0, 1, 2]),
        ([2, 0], 3, [0, 2]),
    ],
)
def test_moe_layers(layers: str | list[int], num_layers: int, expected: list[int]) -> None:
    assert moe_layers(layers, num_layers) == expected


@pytest.mark.parametrize("layers", [[], [3], [-1], [1, 1]])
def test_impossible_moe_layers(layers: list[int]) -> None:
    with user_error("moe.layers", layers, "from 0 to 2"):
        moe_layers(layers, 3)
