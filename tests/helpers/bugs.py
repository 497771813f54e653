"""Bugs that tests plant in training processes (``hooked.py``): unequal lists, zipped strictly."""

from __future__ import annotations

from typing import Any

BUGGY_STEP = 2  # of the process


def _bug() -> list[tuple[int, int]]:
    return list(zip([1, 2, 3], [1, 2], strict=True))


def in_a_step(rank: int, only_rank: str = "") -> None:
    """A step fails on one rank, or on all."""
    from moiie_megatron.training import step

    original, calls = step.count_tokens, 0  # what a step calls first, once

    def count_tokens(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == BUGGY_STEP:
            _bug()
        return original(*args)

    if only_rank in ("", str(rank)):
        step.count_tokens = count_tokens


def in_the_data(rank: int, only_rank: str = "") -> None:
    """Reading a sample fails after some have worked, in whichever process it is read."""
    from moiie_megatron.data.stream.dataset import LlavaDataset

    original, calls = LlavaDataset.__getitem__, 0

    def read(self: LlavaDataset, i: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            _bug()
        return original(self, i)

    if only_rank in ("", str(rank)):
        LlavaDataset.__getitem__ = read  # type: ignore[method-assign]
