"""Skipped samples: the same replacement in every layout, counted, and a limit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.data.stream.skipped_samples import (
    SkippedSampleMonitor,
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
    with user_error("3 of 102"):
        monitor.add(1, skipped(1))
    strict = SkippedSampleMonitor(max_fraction=0.0, minimum=1)
    strict.add(500, skipped(0))
    with user_error("1 of 502 samples"):
        strict.add(1, skipped(1))


def test_monitor_continues_to_count() -> None:
    monitor = SkippedSampleMonitor(max_fraction=0.05, num_used=195, num_skipped=5)
    monitor.add(9, [])
    with user_error("11 of 215 samples"):
        monitor.add(0, skipped(6))
