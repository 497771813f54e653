"""Skipped samples: the same replacement in every layout, counted, and a limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.example import Example, SkippedSample
from moiie_megatron.data.stream.skipped_samples import (
    SkippedSampleMonitor,
    most_in_a_row,
    read_sample,
    replacement,
)
from tests.helpers.user_errors import user_error


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 30), st.data())
def test_replacements_are_pure_and_never_repeat(seed: int, size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    tried = [index]
    for _ in range(size - 1):
        tried.append(replacement(seed, index, tried, size))
        assert tried[-1] == replacement(seed, index, tried[:-1], size)
    assert sorted(tried) == list(range(size))


def test_replacements_depend_on_seed_and_index() -> None:
    firsts = {replacement(seed, 3, [3], 1000) for seed in range(20)}
    firsts |= {replacement(1, index, [index], 1000) for index in range(20)}
    assert len(firsts) > 30


def test_a_good_sample_is_left_as_it_is(damaged: LlavaDataset) -> None:
    sample = read_sample(damaged, 4, seed=7)
    assert sample.record_id == "r4" and sample.skipped_samples == ()
    assert read_sample(damaged, 5, seed=7).skipped_samples[0].index == 5


@pytest.mark.parametrize(
    ("max_fraction", "most"), [(0.0, 10), (0.01, 10), (0.2, 22), (0.5, 50), (0.9, 328), (1, 4096)]
)
def test_samples_in_a_row(max_fraction: float, most: int) -> None:
    """So many that chance skips them all with a probability of at most 1e-15."""
    assert most_in_a_row(max_fraction) == most


class HalfMissing:
    """Samples of which those with an odd number are missing."""

    def __init__(self, good: LlavaDataset) -> None:
        self.good = good

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, i: int) -> Example:
        if i % 2:
            raise BadRecord("no image", "f.json", i)
        return self.good[0]


def test_half_of_the_images_are_missing(dataset: LlavaDataset) -> None:
    """A run that may skip 60 % of its samples goes on; one that may skip 1 % does not."""
    samples, most = HalfMissing(dataset), 0
    for index in range(2000):
        found = read_sample(samples, index, seed=7, max_fraction=0.6)
        most = max(most, len(found.skipped_samples))
    assert most >= 10  # would stop the run at the limit for 1 %
    with user_error("10 samples in a row", "f.json["):
        for index in range(2000):
            read_sample(samples, index, seed=7, max_fraction=0.01)


def skipped(count: int) -> list[SkippedSample]:
    return [SkippedSample("f.json", i, "no image") for i in range(count)]


def test_monitor_counts_and_stops() -> None:
    monitor = SkippedSampleMonitor(max_fraction=0.01)
    for _ in range(9):
        monitor.add(9, skipped(1))  # far too many, but fewer than 100 read
    assert (monitor.num_skipped, monitor.num_read) == (9, 90)
    with user_error(
        "10 of 100 samples (10.0%)",
        "data.max_skipped_fraction 1.0%",
        "repair the data or raise the limit",
        "f.json[0]: no image",
    ):
        monitor.add(9, skipped(1))


def test_monitor_allows_the_fraction_itself() -> None:
    monitor = SkippedSampleMonitor(max_fraction=0.02)
    monitor.add(98, skipped(2))
    monitor.add(0, skipped(10))  # may be chance
    with user_error("13 of 111"):
        monitor.add(0, skipped(1))
    strict = SkippedSampleMonitor(max_fraction=0.0, minimum=1)
    strict.add(500, skipped(0))
    with user_error("1 of 502 samples"):
        strict.add(1, skipped(1))


def test_monitor_continues_to_count() -> None:
    monitor = SkippedSampleMonitor(max_fraction=0.05, num_used=195, num_skipped=5)
    monitor.add(9, [])
    with user_error("30 of 234 samples"):
        monitor.add(0, skipped(25))


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_what_validate_accepts_does_not_stop_a_run(fraction: float) -> None:
    """Data of which exactly the allowed fraction is unusable, in random orders."""
    for seed in range(30):
        bad = np.random.default_rng(seed).permutation(4000) < fraction * 4000
        monitor = SkippedSampleMonitor(fraction)
        for one in bad:
            monitor.add(int(not one), skipped(int(one)))
        assert monitor.num_skipped == fraction * 4000
