"""What the memory tracker counts."""

from __future__ import annotations

import torch

from moiie_megatron.simulation.memory import SAMPLES, MemoryTracker

KIB = 1024


def make(size: int = KIB) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def test_storages_count_once_while_they_live() -> None:
    tracker = MemoryTracker()
    given, made = make(), make()
    tracker.before([given])
    tracker.after([given, made, made[:8], made.view(2, -1)], "experts", "forward", 0)
    assert tracker.peak.activations == {"experts": KIB}
    other = make(2 * KIB)
    tracker.after([other], "router", "backward", 3)
    assert tracker.peak.activations == {"experts": KIB, "router": 2 * KIB}
    assert (tracker.peak.when, tracker.peak.micro_batch) == ("backward", 3)
    view = made[:8]
    del made
    tracker.sample("backward", 3)
    del view, other
    tracker.sample("update", 3)
    first, second = tracker.timeline()
    assert first.total == 3 * KIB and second.total == 0
    assert tracker.peak.total == 3 * KIB  # what was, stays


def test_memory_that_is_used_again_counts_again() -> None:
    tracker = MemoryTracker()
    for _ in range(3):
        tensor = make()
        tracker.after([tensor], "experts", "forward", 0)
        tracker.sample("forward", 0)
        del tensor
    assert [sample.total for sample in tracker.timeline()] == [KIB] * 3
    assert tracker.peak.total == KIB


def test_a_long_timeline_keeps_its_peaks() -> None:
    tracker = MemoryTracker()
    kept = []
    for number in range(5 * SAMPLES):
        high = make(9 * KIB) if number == 777 else make(8)
        tracker.after([high], "other", "forward", 0)
        tracker.sample("forward", 0)
        kept.append(high[:1] if number % 100 == 0 else None)
    timeline = tracker.timeline()
    assert len(timeline) <= SAMPLES
    assert max(sample.total for sample in timeline) == tracker.peak.total > 9 * KIB
