"""Bad samples: the same replacement in every layout, counted, and a limit."""

from __future__ import annotations

import pytest

from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.data.stream.skipped_samples import (
    SkippedSampleMonitor,
    read_sample,
    replacement,
)


def test_replacements_are_pure_and_never_repeat() -> None:
    tried: list[int] = [3]
    for _ in range(6):
        tried.append(replacement(1, 3, tried, 7))
        assert tried[-1] == replacement(1, 3, tried[:-1], 7)
    assert sorted(tried) == list(range(7))
    firsts = {replacement(seed, 3, [3], 1000) for seed in range(20)}
    firsts |= {replacement(1, index, [index], 1000) for index in range(20)}
    assert len(firsts) > 30


def test_a_good_sample_is_left_as_it_is(damaged: LlavaDataset) -> None:
    sample = read_sample(damaged, 4, seed=7)
    assert sample.record_id == "r4" and sample.skipped_samples == ()
    assert read_sample(damaged, 5, seed=7).skipped_samples[0].index == 5


def skipped_samples(count: int) -> list[SkippedSample]:
    return [SkippedSample("f.json", i, "no image") for i in range(count)]


def test_monitor_counts_and_stops() -> None:
    monitor = SkippedSampleMonitor(max_share=0.01)
    for _ in range(9):
        monitor.add(9, skipped_samples(1))  # far too many, but fewer than 100 seen
    assert (monitor.bad, monitor.seen) == (9, 90)
    with pytest.raises(ValueError) as caught:
        monitor.add(9, skipped_samples(1))
    assert str(caught.value) == (
        "Stopping: 10 of 100 samples (10.0%) could not be read, more than "
        "data.max_skipped_fraction 1.0%: repair the data or raise the limit; last: "
        "f.json[0]: no image."
    )


def test_monitor_allows_the_share_itself() -> None:
    monitor = SkippedSampleMonitor(max_share=0.02)
    monitor.add(98, skipped_samples(2))
    with pytest.raises(ValueError, match="3 of 102"):
        monitor.add(1, skipped_samples(1))
    strict = SkippedSampleMonitor(max_share=0.0, minimum=1)
    strict.add(500, skipped_samples(0))
    with pytest.raises(ValueError, match="1 of 502 samples"):
        strict.add(1, skipped_samples(1))


def test_monitor_goes_on_counting() -> None:
    monitor = SkippedSampleMonitor(max_share=0.05, good=195, bad=5)
    monitor.add(9, [])
    with pytest.raises(ValueError, match="11 of 215 samples"):
        monitor.add(0, skipped_samples(6))
