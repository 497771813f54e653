"""The order of samples: what an epoch holds, by hand, by counting and by properties."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Philox, SeedSequence

from moiie_megatron.data.stream.order import Blend, SampleOrder

CHECKS = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)
SOURCES = st.lists(st.tuples(st.integers(1, 12), st.floats(0.05, 3.0)), min_size=1, max_size=4)
FROZEN = [1, 2, 0, 3, 5, 4, 3, 0, 5, 4, 1, 2]


def epoch(order: SampleOrder, number: int) -> list[int]:
    return [order.sample_at(number * order.size + i) for i in range(order.size)]


def blend_of(sources: list[tuple[int, float]]) -> Blend:
    return Blend.weighted([size for size, _ in sources], [weight for _, weight in sources])


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run must continue in the same order after an upgrade: frozen values."""
    assert [SampleOrder(6, seed=1234).sample_at(n) for n in range(12)] == FROZEN


@CHECKS
@given(st.integers(1, 60), SEEDS, st.integers(0, 5))
def test_an_epoch_is_a_permutation(size: int, seed: int, number: int) -> None:
    assert sorted(epoch(SampleOrder(size, seed), number)) == list(range(size))


def test_every_epoch_is_another_permutation() -> None:
    order = SampleOrder(23, seed=7)
    epochs = [epoch(order, e) for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != list(range(23))
    assert epoch(SampleOrder(23, seed=8), 0) != epochs[0]


@CHECKS
@given(SOURCES, SEEDS)
def test_no_sample_is_drawn_again_before_all_others(
    sources: list[tuple[int, float]], seed: int
) -> None:
    blend = blend_of(sources)
    order = SampleOrder(blend, seed)
    seen: Counter[int] = Counter()
    for e in range(4):
        seen.update(epoch(order, e))
        first = 0
        for size, count in zip(blend.sizes, blend.counts, strict=True):
            draws = [seen[i] for i in range(first, first + size)]
            assert sum(draws) == (e + 1) * count
            assert max(draws) - min(draws) <= 1
            first += size
    assert sum(seen.values()) == 4 * blend.epoch_size


@CHECKS
@given(SOURCES, SEEDS, st.lists(st.integers(0, 200), min_size=1, max_size=20))
def test_any_sample_can_be_asked_for_first(
    sources: list[tuple[int, float]], seed: int, numbers: list[int]
) -> None:
    blend = blend_of(sources)
    whole = SampleOrder(blend, seed)
    in_order = {n: whole.sample_at(n) for n in range(max(numbers) + 1)}
    fresh = SampleOrder(blend, seed)
    assert [fresh.sample_at(n) for n in numbers] == [in_order[n] for n in numbers]


def test_counts_are_rounded_and_never_zero() -> None:
    blend = Blend.weighted([10, 10, 10, 3], [1.0, 0.26, 2.0, 0.01])
    assert blend.counts == (10, 3, 20, 1)
    assert blend.epoch_size == 34
    assert blend.describe_epoch(["a", "b", "c", "d"]) == (
        "34 samples per epoch: a 10, b 3 (of 10), c 20 (of 10), d 1 (of 3)"
    )


def test_weights_of_one_change_nothing() -> None:
    """Several sources that are seen whole are one long source."""
    plain, blended = SampleOrder(23, seed=7), SampleOrder(Blend.weighted([4, 19], [1, 1]), seed=7)
    assert [plain.sample_at(n) for n in range(70)] == [blended.sample_at(n) for n in range(70)]


def test_half_a_source_is_another_half_in_the_next_epoch() -> None:
    order = SampleOrder(Blend.weighted([6, 4], [1.0, 0.5]), seed=3)
    epochs = [epoch(order, e) for e in range(4)]
    for e in range(4):
        assert sorted(i for i in epochs[e] if i < 6) == list(range(6))
        assert len(epochs[e]) == 8
    seen = [[i for i in one if i >= 6] for one in epochs]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == [6, 7, 8, 9]


def test_twice_is_twice_in_every_epoch() -> None:
    order = SampleOrder(Blend.weighted([2, 3], [2.0, 1.0]), seed=3)
    for e in range(3):
        assert sorted(epoch(order, e)) == [0, 0, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", [2, 5])
def test_by_hand(seed: int) -> None:
    """Second epoch of half a source: positions 2 and 3 of round 0, then the epoch's order."""

    def permutation(size: int, *key: int) -> list[int]:
        words = Philox(SeedSequence(key)).random_raw(size)
        return [int(i) for i in np.argsort(words, kind="stable")]

    order = SampleOrder(Blend.weighted([3, 4], [1.0, 0.5]), seed=seed)
    drawn = [3 + permutation(4, seed, 1, 0, 1)[position] for position in (2, 3)]
    entries = [0, 1, 2, *drawn]
    assert epoch(order, 1) == [entries[i] for i in permutation(5, seed, 1)]
