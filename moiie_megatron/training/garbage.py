"""When Python looks for garbage: at the same steps on all ranks, not whenever each rank wants."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def collect_every(interval: int | None) -> Iterator[Callable[[int], None]]:
    """Collect garbage every so many steps, and in between not at all.

    A rank that stops to collect makes all others wait in their next collective; ranks that stop
    together cost that time once.  As in torchtitan (``tools/utils.py``) the youngest two of three
    generations are collected.

    Args:
        interval: Steps from one collection to the next; None leaves it to Python.

    Yields:
        What is to be called with the number of every finished step.
    """
    if interval is None or not gc.isenabled():
        yield lambda step: None
        return
    gc.collect()
    gc.disable()
    try:
        yield partial(_collect, interval)
    finally:
        gc.enable()


def _collect(interval: int, step: int) -> None:
    if step % interval == 0:
        gc.collect(1)
