"""Blends: what an epoch holds, by hand and by counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.random import Philox, SeedSequence

from moiie_megatron.data.stream.order import Blend, SampleOrder


def epoch(order: SampleOrder, number: int) -> list[int]:
    return [order.sample_at(number * order.size + i) for i in range(order.size)]


def test_counts_are_rounded_and_never_zero() -> None:
    blend = Blend.weighted([10, 10, 10, 3], [1.0, 0.26, 2.0, 0.01])
    assert blend.counts == (10, 3, 20, 1)
    assert blend.epoch_size == 34
    assert blend.describe() == "10 of 10, 3 of 10, 20 of 10, 1 of 3"


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


@pytest.mark.parametrize("weight", [0.3, 0.7, 1.5, 2.4])
def test_no_sample_is_ahead_of_another_by_more_than_one(weight: float) -> None:
    order = SampleOrder(Blend.weighted([5, 10], [1.0, weight]), seed=11)
    seen: Counter[int] = Counter()
    for e in range(7):
        seen.update(i for i in epoch(order, e) if i >= 5)
        counts = [seen[i] for i in range(5, 15)]
        assert sum(counts) == (e + 1) * round(weight * 10)
        assert max(counts) - min(counts) <= 1


def test_by_hand() -> None:
    """Second epoch of half a source: places 2 and 3 of its round 0, then the epoch's order."""

    def permutation(size: int, *key: int) -> list[int]:
        words = Philox(SeedSequence(key)).random_raw(size)
        return [int(i) for i in np.argsort(words, kind="stable")]

    order = SampleOrder(Blend.weighted([3, 4], [1.0, 0.5]), seed=5)
    entries = [0, 1, 2] + [3 + permutation(4, 5, 1, 0, 1)[place] for place in (2, 3)]
    assert epoch(order, 1) == [entries[i] for i in permutation(5, 5, 1)]


def test_any_sample_can_be_asked_for_first() -> None:
    blend = Blend.weighted([5, 7, 4], [0.4, 1.3, 1.0])
    order = SampleOrder(blend, seed=2)
    whole = [order.sample_at(n) for n in range(60)]
    assert [SampleOrder(blend, seed=2).sample_at(n) for n in (59, 3, 31)] == [
        whole[59],
        whole[3],
        whole[31],
    ]
    assert [SampleOrder(blend, seed=3).sample_at(n) for n in range(60)] != whole
