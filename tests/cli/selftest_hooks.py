"""What goes wrong in a rank of a self-test (``tests/helpers/hooked.py``)."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor


def wrong_then_gone(rank: int) -> None:
    """grouped_mm is wrong on rank 1; later it leaves the check of the layer with an error, while
    rank 0 waits for it in a collective."""
    from moiie_megatron.selftest import main, watchdog
    from moiie_megatron.selftest.checks import kernels, parity

    watchdog.GRACE = 2.0  # type: ignore[misc]
    if rank != 1:
        return
    original = kernels.grouped_ffn
    kernels.grouped_ffn = lambda *given: original(*given) * 2  # type: ignore[assignment]

    def record_layer(*given: object) -> dict[str, Tensor]:
        raise ValueError("planted")

    parity.record_layer = record_layer  # type: ignore[assignment]
    assert "layer" in [check.name for check in main.CHECKS]


def stuck(rank: int) -> None:
    """Rank 1 never comes back from the check of attention, which has two seconds."""
    from moiie_megatron.selftest import main
    from moiie_megatron.selftest.checks import kernels

    if rank == 1:
        kernels.SEGMENTS = _Endless()  # type: ignore[assignment, misc]
    main.CHECKS = tuple(  # type: ignore[misc, assignment]
        replace(check, limit=2.0) if check.name == "attention" else check for check in main.CHECKS
    )


class _Endless:
    def __iter__(self) -> _Endless:
        time.sleep(600)
        return self
