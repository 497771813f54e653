"""What counts as a spike of the loss."""

from __future__ import annotations

import math

from moiie_megatron.training.anomalies import MIN_STEPS, WINDOW, SpikeDetector


def test_the_first_losses_say_nothing() -> None:
    detector = SpikeDetector(3.0)
    assert [detector.add(loss) for loss in (1.0, 100.0, 1.0)] == [None] * 3
    assert len(detector.losses) < MIN_STEPS


def test_a_spike_is_told_by_the_median() -> None:
    detector = SpikeDetector(3.0)
    for _ in range(MIN_STEPS):
        assert detector.add(2.0) is None
    assert detector.add(6.0) is None  # not above
    assert detector.add(6.5) == 3.25
    # Spikes do not move the median.
    assert detector.add(8.0) == 4.0


def test_a_new_level_is_learned() -> None:
    detector = SpikeDetector(3.0)
    for _ in range(WINDOW):
        detector.add(1.0)
    reports = [detector.add(4.0) for _ in range(WINDOW)]
    assert reports[0] == 4.0
    assert reports[-1] is None
    assert list(detector.losses) == [4.0] * WINDOW


def test_losses_of_zero() -> None:
    detector = SpikeDetector(3.0)
    for _ in range(MIN_STEPS):
        detector.add(0.0)
    assert detector.add(1.0) is None  # no multiple of nothing
    assert not math.isnan(sum(detector.losses))
