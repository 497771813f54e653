"""Interleaved timing: what runs when, and what is made of the times."""

from __future__ import annotations

from moiie_megatron.utils.timing import Timings, interleave


def test_every_run_comes_first_in_turn() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleave(runs, rounds=3, warmup=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == dict.fromkeys(
        "abc", 3
    )


def test_ratios_are_medians_over_rounds() -> None:
    timings = Timings({"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 4.0]})
    assert timings.median("slow") == 4 and timings.ratio("slow", "fast") == 2
    assert timings.fastest(["slow", "fast"]) == "slow"  # by medians: 4 and 4, the first
