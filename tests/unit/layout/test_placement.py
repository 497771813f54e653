"""Placements: known tables, optimality by brute force, independence of checkpoints' names."""

from __future__ import annotations

import itertools

import pytest

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import balanced, contiguous, expected_loads, place_experts
from tests.helpers.user_errors import user_error

FOUR, EIGHT = ExpertLayout(1, 2, 1), ExpertLayout(2, 4, 2)


@pytest.mark.parametrize(
    ("layout", "ep_size", "image_fraction", "plain", "best"),
    [
        # Uniform choice within each router, by hand: at 80 % image tokens a vision expert gets
        # 0.8 * 2/3, a shared one 2/3, a text one 0.2 * 2/3 of the tokens.
        (FOUR, 2, 0.5, 1.0, 1.0),
        (FOUR, 2, 0.8, 1.2, 1.2),
        (FOUR, 4, 0.5, 4 / 3, 4 / 3),
        (EIGHT, 2, 0.8, 1.2, 1.0),
        (EIGHT, 2, 0.2, 1.2, 1.0),
        (EIGHT, 4, 0.5, 4 / 3, 1.0),
        (EIGHT, 4, 0.8, 4 / 3, 1.2),
        (EIGHT, 8, 0.8, 4 / 3, 4 / 3),
    ],
)
def test_known_imbalance(
    layout: ExpertLayout, ep_size: int, image_fraction: float, plain: float, best: float
) -> None:
    assert contiguous(layout, ep_size, image_fraction).imbalance == pytest.approx(plain)
    found = balanced(layout, ep_size, image_fraction=image_fraction)
    assert found.imbalance == pytest.approx(best)
    assert sorted(found.physical_to_logical) == list(range(layout.num_experts))


def test_groups_are_spread_evenly_where_the_numbers_allow() -> None:
    found = balanced(EIGHT, 2)
    assert found.physical_to_logical == (0, 2, 3, 6, 1, 4, 5, 7)
    assert found.balanced_for_any_fraction
    assert found.describe(EIGHT) == "V S S T | V S S T (balanced for any fraction of image tokens)"


def test_the_identity_is_kept_where_nothing_is_better() -> None:
    assert balanced(FOUR, 4, image_fraction=0.8).is_identity
    assert balanced(FOUR, 2, image_fraction=0.8).is_identity
    assert "1.20 of the mean" in balanced(FOUR, 2, image_fraction=0.8).describe(FOUR)


def test_measured_loads_are_split_as_well_as_possible() -> None:
    loads = [5.0, 9.0, 1.0, 2.0, 8.0, 3.0, 7.0, 4.0]
    found = balanced(EIGHT, 2, loads=loads)
    best = min(
        max(sum(loads[e] for e in half), sum(loads) - sum(loads[e] for e in half))
        for half in itertools.combinations(range(8), 4)
    )
    assert found.imbalance == pytest.approx(best / (sum(loads) / 2))


def test_loads_add_up_to_top_k() -> None:
    for layout in (FOUR, EIGHT, ExpertLayout(0, 4, 0), ExpertLayout(2, 0, 2)):
        assert sum(expected_loads(layout, 0.3)) == pytest.approx(layout.top_k)


def test_errors() -> None:
    with user_error("parallel.expert", 3, "4 experts"):
        balanced(FOUR, 3)
    with pytest.raises(ValueError, match="2 loads for 4 experts"):
        balanced(FOUR, 2, loads=[1.0, 2.0])


def test_a_placement_is_computed_once() -> None:
    layout = ExpertLayout(2, 4, 2)
    found = place_experts("balanced", layout, 2, 0.7, None)
    assert found == balanced(layout, 2, image_fraction=0.7)
    assert place_experts("balanced", layout, 2, 0.7, None) is found
    assert place_experts("contiguous", layout, 2, 0.7, None) == contiguous(layout, 2, 0.7)
