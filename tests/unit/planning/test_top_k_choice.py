"""Experts that a token chooses together: sums by hand, and over all sets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moiie_megatron.planning.top_k_choice import TopKChoice

LOADS = [
    (0.5, 0.5, 0.5, 0.5),
    (2 / 3, 2 / 3, 2 / 3, 0.0),
    (1.0, 0.5, 0.25, 0.25),
    (1.0, 1.0, 0.0, 0.0),
    (0.999, 0.5, 0.4, 0.101),
    (0.9, 0.8, 0.7, 0.3, 0.2, 0.1),
    tuple(3 / 64 for _ in range(64)),
    (1.0, 1 - 4e-6, 2e-6, 2e-6),
    (1.0, 1 - 5e-7, 5e-7, 0.0),
    (1 - 5e-6, 1 - 5e-6, 5e-7, 9.5e-6),
]


@pytest.mark.parametrize("loads", LOADS)
def test_every_expert_has_its_load(loads: tuple[float, ...]) -> None:
    choice = TopKChoice(loads)
    assert choice.top_k == round(sum(loads))
    for expert, load in enumerate(loads):
        assert choice.any_of([expert]) == pytest.approx(load, abs=2e-6)
    assert choice.any_of(range(len(loads))) == pytest.approx(1)
    assert choice.any_of([]) == pytest.approx(0)


def test_equal_loads_choose_all_pairs_alike() -> None:
    """Of the 6 pairs of 4 experts 5 hold expert 0 or 1, of the 3 pairs of 3 all do."""
    assert TopKChoice(LOADS[0]).any_of([0, 1]) == pytest.approx(5 / 6)
    assert TopKChoice(LOADS[1]).any_of([0, 1]) == pytest.approx(1)
    assert TopKChoice(LOADS[1]).any_of([0, 3]) == pytest.approx(2 / 3)


def test_the_probability_of_a_set_is_a_product_of_weights() -> None:
    """For loads that a product of weights has, summed over all pairs."""
    weights = np.array([4.0, 2.0, 1.0, 1.0, 0.5])
    pairs = {pair: weights[pair[0]] * weights[pair[1]] for pair in combinations(range(5), 2)}
    total = sum(pairs.values())
    loads = [sum(p for pair, p in pairs.items() if e in pair) / total for e in range(5)]
    choice = TopKChoice(tuple(loads))
    for some in ([0, 1], [2, 4], [1, 2, 3]):
        expected = sum(p for pair, p in pairs.items() if set(pair) & set(some)) / total
        assert choice.any_of(some) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("loads", LOADS)
def test_samples_have_top_k_experts_and_their_loads(loads: tuple[float, ...]) -> None:
    choice = TopKChoice(loads)
    routing_map = choice.sample(20_000, np.random.default_rng(0))
    assert routing_map.shape == (20_000, len(loads))
    assert (routing_map.sum(axis=1) == choice.top_k).all()
    # Five standard deviations of a mean of that many draws.
    np.testing.assert_allclose(routing_map.mean(axis=0), loads, atol=5 * 0.5 / np.sqrt(20_000))
    both = routing_map[:, :2].any(axis=1).mean()
    assert both == pytest.approx(choice.any_of([0, 1]), abs=5 * 0.5 / np.sqrt(20_000))
